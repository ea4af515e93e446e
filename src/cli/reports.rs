//! Reports that need no node: `doctor` and `limits`.

use serde_json::json;

use super::args::Report;
use super::failure::{MISSING_FEATURE, Reported};
use super::output::{Align, Output, grouped, table};
use crate::limits::{LIMITS, Limit, Unit};
use crate::sys::behaviour::Behaviour;
use crate::sys::probe::{Outcome, Probe, probe_all};
use crate::track::{Asked, choose};
use crate::units::ByteSize;
use crate::words::Publish;

/// Tries every kernel feature; ends with code 3 if a required one is missing.
pub(super) fn doctor(report: Report) -> anyhow::Result<()> {
    let probes = probe_all();
    let missing = probes.iter().any(|p| p.required && !works(p));
    let mut out = Output::new();
    if report.json {
        let features: Vec<_> = probes.iter().map(probe_json).collect();
        out.json(&json!({ "ready": !missing, "features": features, "auto": choices() }))?;
    } else {
        let mut rows = table([
            ("FEATURE", Align::Left),
            ("STATE", Align::Left),
            ("FOR", Align::Left),
            ("FOUND", Align::Left),
        ]);
        for probe in &probes {
            let (state, found) = match &probe.outcome {
                Outcome::Works { detail } => ("works", detail),
                Outcome::Missing { reason, .. } if probe.required => ("MISSING", reason),
                Outcome::Missing { reason, .. } => ("absent", reason),
            };
            rows.add_row([probe.name, state, probe.purpose, found]);
        }
        out.table(&rows)?;
        for probe in &probes {
            if let Outcome::Missing { remedy, .. } = probe.outcome {
                out.line(format_args!("\n{}: {remedy}", probe.name))?;
            }
        }
        out.line("\nMode auto picks here:")?;
        for choice in choices() {
            let text = |key: &str| choice[key].as_str().unwrap_or("none").to_owned();
            let exact = if choice["exact"] == true {
                ", exact"
            } else {
                ""
            };
            out.line(format_args!(
                "  publish {}{exact}: {} ({})",
                text("publish"),
                text("mode"),
                text("reason")
            ))?;
        }
        out.line(if missing {
            "\nA required feature is missing: `serve` cannot run here."
        } else {
            "\nEverything that is required works."
        })?;
    }
    out.done()?;
    if missing {
        return Err(Reported(MISSING_FEATURE).into());
    }
    Ok(())
}

/// What mode `auto` picks here for each thing that may be asked of it.
fn choices() -> Vec<serde_json::Value> {
    let found = Behaviour::of_process();
    let mut choices = Vec::new();
    for publish in [Publish::Timer, Publish::Commit] {
        for exact in [false, true] {
            let asked = Asked {
                publish,
                exact,
                marks: false,
            };
            let (mode, reason) = match choose(asked, found) {
                Ok(choice) => (Some(choice.mode), choice.reason),
                Err(unmet) => (None, unmet.to_string()),
            };
            choices.push(json!({
                "publish": publish,
                "exact": exact,
                "mode": mode,
                "reason": reason,
            }));
        }
    }
    choices
}

fn works(probe: &Probe) -> bool {
    matches!(probe.outcome, Outcome::Works { .. })
}

fn probe_json(probe: &Probe) -> serde_json::Value {
    let (detail, remedy) = match &probe.outcome {
        Outcome::Works { detail } => (detail, None),
        Outcome::Missing { reason, remedy } => (reason, Some(*remedy)),
    };
    json!({
        "name": probe.name,
        "purpose": probe.purpose,
        "required": probe.required,
        "works": works(probe),
        "detail": detail,
        "remedy": remedy,
    })
}

/// Lists every bound with its reason.
pub(super) fn limits(report: Report) -> anyhow::Result<()> {
    let mut out = Output::new();
    if report.json {
        let limits: Vec<_> = LIMITS
            .iter()
            .map(|limit| {
                json!({
                    "name": limit.name,
                    "value": limit.value,
                    "unit": unit_name(limit.unit),
                    "reason": limit.reason.trim(),
                })
            })
            .collect();
        out.json(&limits)?;
    } else {
        let mut rows = table([
            ("LIMIT", Align::Left),
            ("VALUE", Align::Right),
            ("REASON", Align::Left),
        ]);
        for limit in LIMITS {
            rows.add_row([limit.name, &value_text(limit), limit.reason.trim()]);
        }
        out.table(&rows)?;
    }
    Ok(out.done()?)
}

fn unit_name(unit: Unit) -> &'static str {
    match unit {
        Unit::Bytes => "bytes",
        Unit::Count => "count",
        Unit::Micros => "us",
        Unit::Millis => "ms",
    }
}

fn value_text(limit: &Limit) -> String {
    match limit.unit {
        Unit::Bytes => ByteSize(limit.value).to_string(),
        Unit::Count => grouped(limit.value),
        Unit::Micros => format!("{} us", grouped(limit.value)),
        Unit::Millis => format!("{} ms", grouped(limit.value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_said_with_their_unit() {
        let limit = |value, unit| Limit {
            name: "X",
            value,
            unit,
            reason: "",
        };
        assert_eq!(value_text(&limit(256 << 10, Unit::Bytes)), "256 KiB");
        assert_eq!(value_text(&limit(16_384, Unit::Count)), "16 384");
        assert_eq!(value_text(&limit(5_000, Unit::Millis)), "5 000 ms");
        assert_eq!(value_text(&limit(50, Unit::Micros)), "50 us");
    }
}

//! From the greeting to the choice of an export: fixed newstyle.
//!
//! - I1: what was agreed on metadata holds for the export that it was asked of, and for no
//!   other.
//! - I2: an option that is refused changes nothing, but for SET_META_CONTEXT, which always
//!   begins with nothing chosen.

use zerocopy::{FromBytes, IntoBytes};

use super::context::{self, Context};
use super::export::{Catalog, Export};
use super::numbers::{
    FIXED_NEWSTYLE, MAGIC, NO_ZEROES, OPTION_BYTES, OPTION_MAGIC, RawGreeting, RawOption, can,
    info, option, rep,
};
use super::options::{Chosen, Misformed, Queries};
use super::reply;
use super::session::Violation;
use crate::limits::{
    MAX_NBD_OPTION, MAX_NBD_OPTIONS, MAX_NBD_PAYLOAD, MAX_NBD_TEXT, NBD_PREFERRED_BLOCK,
};

/// What client and server have agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    /// The export, as it was when it was chosen.
    pub(super) export: Export,
    /// Whether replies are structured.
    pub(super) structured: bool,
    /// What block status may be asked for; the first one's number is 1.
    pub(super) contexts: Vec<Context>,
}

/// How far a call came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// This many bytes have to be there.
    Needs(usize),
    /// This many bytes were used.
    Used(usize),
    /// This many bytes were used, and the export is chosen.
    Chosen(usize, Box<Agreed>),
    /// The client has had enough; this many bytes were used.
    Aborted(usize),
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Greeting,
    Flags,
    Option,
    /// Bytes of a refused option that are still to come.
    Passing(u32),
}

/// The state of one handshake.
#[derive(Debug)]
pub(super) struct Handshake {
    step: Step,
    flags: u16,
    options: u64,
    structured: bool,
    /// The export that contexts were asked of, and which.
    contexts: Option<(Box<str>, Vec<Context>)>,
}

impl Handshake {
    pub(super) fn new() -> Self {
        Self {
            step: Step::Greeting,
            flags: 0,
            options: 0,
            structured: false,
            contexts: None,
        }
    }

    /// One step with what was received.
    pub(super) fn step(
        &mut self,
        exports: &dyn Catalog,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Progress, Violation> {
        match self.step {
            Step::Greeting => {
                let greeting = RawGreeting {
                    magic: MAGIC.into(),
                    option_magic: OPTION_MAGIC.into(),
                    flags: (FIXED_NEWSTYLE | NO_ZEROES).into(),
                };
                out.extend_from_slice(greeting.as_bytes());
                self.step = Step::Flags;
                Ok(Progress::Used(0))
            }
            Step::Flags => self.flags(input),
            Step::Option => self.option(exports, input, out),
            Step::Passing(left) => {
                let now = input.len().min(left as usize);
                if now == 0 {
                    return Ok(Progress::Needs(1));
                }
                self.pass(left - now as u32);
                Ok(Progress::Used(now))
            }
        }
    }

    fn pass(&mut self, left: u32) {
        self.step = match left {
            0 => Step::Option,
            left => Step::Passing(left),
        };
    }

    fn flags(&mut self, input: &[u8]) -> Result<Progress, Violation> {
        let Some(flags) = input.first_chunk::<4>() else {
            return Ok(Progress::Needs(4));
        };
        let flags = u32::from_be_bytes(*flags);
        let known = u32::from(FIXED_NEWSTYLE | NO_ZEROES);
        if flags & !known != 0 {
            return Err(Violation::ClientFlags { flags });
        }
        self.flags = flags as u16;
        self.step = Step::Option;
        Ok(Progress::Used(4))
    }

    fn option(
        &mut self,
        exports: &dyn Catalog,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Progress, Violation> {
        let Ok((raw, rest)) = RawOption::ref_from_prefix(input) else {
            return Ok(Progress::Needs(OPTION_BYTES));
        };
        if raw.magic.get() != OPTION_MAGIC {
            return Err(Violation::OptionMagic {
                found: raw.magic.get(),
            });
        }
        let (number, len) = (raw.option.get(), raw.len.get());
        let exporting = number == option::EXPORT_NAME;
        if self.flags & FIXED_NEWSTYLE == 0 && !exporting {
            return Err(Violation::NotFixed { option: number });
        }
        if exporting && u64::from(len) > MAX_NBD_TEXT {
            return Err(Violation::NoSuchExport);
        }
        if self.options == MAX_NBD_OPTIONS {
            return Err(Violation::Options);
        }
        if !known(number) || u64::from(len) > MAX_NBD_OPTION {
            let kind = if known(number) {
                rep::ERR_TOO_BIG
            } else {
                rep::ERR_UNSUP
            };
            reply::to_option(out, number, kind, &[]);
            self.options += 1;
            self.pass(len);
            return Ok(Progress::Used(OPTION_BYTES));
        }
        let whole = OPTION_BYTES + len as usize;
        let Some(data) = rest.get(..len as usize) else {
            return Ok(Progress::Needs(whole));
        };
        self.options += 1;
        self.answer(exports, number, data, out)
            .map(|ends| match ends {
                Ends::No => Progress::Used(whole),
                Ends::Chosen(agreed) => Progress::Chosen(whole, agreed),
                Ends::Aborted => Progress::Aborted(whole),
            })
    }

    fn answer(
        &mut self,
        exports: &dyn Catalog,
        number: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Ends, Violation> {
        let reply = |out: &mut Vec<u8>, kind| reply::to_option(out, number, kind, &[]);
        let empty = data.is_empty();
        match number {
            option::EXPORT_NAME => {
                return self.export_name(exports, data, out).map(Ends::Chosen);
            }
            option::ABORT => {
                reply(out, rep::ACK);
                return Ok(Ends::Aborted);
            }
            option::LIST if empty => {
                for export in exports.all() {
                    let len = (export.name.len() as u32).to_be_bytes();
                    let parts = [&len, export.name.as_bytes(), export.description.as_bytes()];
                    reply::to_option(out, number, rep::SERVER, &parts);
                }
                reply(out, rep::ACK);
            }
            option::STRUCTURED_REPLY if empty => {
                self.structured = true;
                reply(out, rep::ACK);
            }
            option::INFO | option::GO => {
                let agreed = self.info(exports, number, data, out);
                if let (option::GO, Some(agreed)) = (number, agreed) {
                    return Ok(Ends::Chosen(agreed));
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.contexts(exports, number, data, out);
            }
            _ => reply(out, rep::ERR_INVALID),
        }
        Ok(Ends::No)
    }

    fn agreed(&self, export: Export) -> Box<Agreed> {
        let contexts = match &self.contexts {
            Some((name, contexts)) if self.structured && *name == export.name => contexts.clone(),
            _ => Vec::new(),
        };
        Box::new(Agreed {
            export,
            structured: self.structured,
            contexts,
        })
    }

    fn export_name(
        &self,
        exports: &dyn Catalog,
        name: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Box<Agreed>, Violation> {
        let export = exports.find(name).ok_or(Violation::NoSuchExport)?;
        out.extend_from_slice(&export.size.to_be_bytes());
        out.extend_from_slice(&self.abilities(&export).to_be_bytes());
        if self.flags & NO_ZEROES == 0 {
            out.extend_from_slice(&[0; 124]);
        }
        Ok(self.agreed(export))
    }

    /// Transmission flags of `export`.
    fn abilities(&self, export: &Export) -> u16 {
        let common = can::HAS_FLAGS | can::FLUSH | can::FUA | can::MULTI_CONN | can::CACHE;
        let writes = if export.read_only {
            can::READ_ONLY
        } else {
            can::TRIM | can::WRITE_ZEROES | can::FAST_ZERO
        };
        let structured = if self.structured { can::DF } else { 0 };
        common | writes | structured
    }

    /// INFO and GO; what would be agreed on if there is such an export.
    fn info(
        &self,
        exports: &dyn Catalog,
        number: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Option<Box<Agreed>> {
        let Ok(chosen) = Chosen::parse(data) else {
            reply::to_option(out, number, rep::ERR_INVALID, &[]);
            return None;
        };
        let Some(export) = exports.find(chosen.name) else {
            let text = b"there is no such export; LIST names them";
            reply::to_option(out, number, rep::ERR_UNKNOWN, &[text]);
            return None;
        };
        let mut inform = |kind: u16, parts: &[&[u8]]| {
            let kind = kind.to_be_bytes();
            let parts = [&[&kind[..]], parts].concat();
            reply::to_option(out, number, rep::INFO, &parts);
        };
        let abilities = self.abilities(&export).to_be_bytes();
        inform(info::EXPORT, &[&export.size.to_be_bytes(), &abilities]);
        if chosen.wants(info::NAME) {
            inform(info::NAME, &[export.name.as_bytes()]);
        }
        if chosen.wants(info::DESCRIPTION) {
            inform(info::DESCRIPTION, &[export.description.as_bytes()]);
        }
        if chosen.wants(info::BLOCK_SIZE) {
            let sizes = [1, NBD_PREFERRED_BLOCK, MAX_NBD_PAYLOAD];
            let sizes = sizes.map(|size| (size as u32).to_be_bytes()).concat();
            inform(info::BLOCK_SIZE, &[&sizes]);
        }
        reply::to_option(out, number, rep::ACK, &[]);
        Some(self.agreed(export))
    }

    fn contexts(&mut self, exports: &dyn Catalog, number: u32, data: &[u8], out: &mut Vec<u8>) {
        let setting = number == option::SET_META_CONTEXT;
        if setting {
            self.contexts = None;
        }
        let asked = match Queries::parse(data) {
            Ok(asked) if self.structured => asked,
            Ok(_) | Err(Misformed) => {
                return reply::to_option(out, number, rep::ERR_INVALID, &[]);
            }
        };
        let Some(export) = exports.find(asked.name) else {
            return reply::to_option(out, number, rep::ERR_UNKNOWN, &[]);
        };
        let found = match setting {
            true => context::chosen(&export, &asked.queries),
            false => context::listed(&export, &asked.queries),
        };
        for (id, context) in (1_u32..).zip(&found) {
            let id = if setting { id } else { 0 };
            let parts = [&id.to_be_bytes(), context.name().as_bytes()];
            reply::to_option(out, number, rep::META_CONTEXT, &parts);
        }
        if setting && !found.is_empty() {
            self.contexts = Some((export.name, found));
        }
        reply::to_option(out, number, rep::ACK, &[]);
    }
}

/// Whether an option ends the handshake.
enum Ends {
    No,
    Chosen(Box<Agreed>),
    Aborted,
}

fn known(number: u32) -> bool {
    matches!(
        number,
        option::EXPORT_NAME
            | option::ABORT
            | option::LIST
            | option::INFO
            | option::GO
            | option::STRUCTURED_REPLY
            | option::LIST_META_CONTEXT
            | option::SET_META_CONTEXT
    )
}

//! The command line: what stands between a shell and the rooms below.
//!
//! Each command is one function that returns `anyhow::Result<()>`; how its error is
//! said and which exit code it becomes is decided once, in `failure`. Reports go
//! to standard output, everything else to standard error.

pub mod args;
pub mod channel;
mod demo;
mod failure;
mod output;
mod region;
mod reports;
mod serve;
pub mod space;
mod status;
pub mod var;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command};
use output::Output;

/// Runs the command that the process was started with, to its end.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not errors; a closed pipe has no reader.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(failure::BAD_INPUT)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let node = NodeAt(cli.socket);
    match cli.command {
        Command::Serve(args) => serve::run(args, node.0),
        Command::Region(command) => region::run(command, &node),
        Command::Channel(command) => channel::run(command),
        Command::Var(command) => var::run(command, &node),
        Command::Space(command) => space::run(command),
        Command::Status(report) => status::run(report, &node),
        Command::Demo(args) => demo::run(args),
        Command::Doctor(report) => reports::doctor(report),
        Command::Limits(report) => reports::limits(report),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "uffd-sync", &mut script);
            print_raw(&script)
        }
        Command::Man { dir: None } => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page)?;
            print_raw(&page)
        }
        Command::Man { dir: Some(dir) } => {
            use anyhow::Context as _;
            clap_mangen::generate_to(Cli::command(), &dir)
                .with_context(|| format!("writing manual pages to {}", dir.display()))
        }
        Command::VarDemoProcess(args) => var::party::run(&args),
        Command::DemoWriter(args) => demo::writer::run(&args, &node),
        Command::DemoReader(args) => demo::reader::run(&args, &node),
    }
}

fn print_raw(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = Output::new();
    out.bytes(bytes)?;
    Ok(out.done()?)
}

/// Which node a command speaks to: the one of `--socket`, or of this user.
struct NodeAt(Option<PathBuf>);

impl NodeAt {
    fn path(&self) -> PathBuf {
        self.0.clone().unwrap_or_else(crate::node::default_socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_visible_argument_is_explained() {
        fn walk(command: &clap::Command) {
            for argument in command.get_arguments() {
                let name = argument.get_id();
                assert!(
                    argument.get_help().is_some(),
                    "{}: {name}",
                    command.get_name()
                );
            }
            command.get_subcommands().for_each(walk);
        }
        walk(&Cli::command());
    }

    #[test]
    fn bad_input_is_refused_before_anything_is_done() {
        for line in [
            "region create",
            "region create a",
            "region create a/b --size 1MiB",
            "region create a --size 12XB",
            "region create a --size -1",
            "region read a --offset x",
            "region watch a --count -1",
            "serve --listen localhost",
            "serve --follow http://a:1/b",
            "demo --seconds 0",
            "var set x",
            "var cas x 1",
            "var get x --deadline soon",
            "var reset --load",
            "no-such-command",
        ] {
            let words = ["uffd-sync"].into_iter().chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }

    #[test]
    fn the_socket_may_stand_anywhere() {
        for line in [
            "--socket /s status --json",
            "status --json --socket /s",
            "region --socket /s show a",
        ] {
            let words = ["uffd-sync"].into_iter().chain(line.split(' '));
            let cli = Cli::try_parse_from(words).expect(line);
            assert_eq!(cli.socket.as_deref(), Some("/s".as_ref()), "{line}");
        }
    }
}

//! Where in a file the entry stands that does not fit the others. A relation between the
//! entries of `[variables]` is checked once the whole table was read, and then the reader
//! only knows where the table begins. Pure.

use serde::Deserialize;
use toml::{Spanned, Value};

use super::config::{Definition, Member, VariablesConfig, VariablesError};

#[derive(Deserialize)]
struct File {
    variables: Spanned<Value>,
}

#[derive(Deserialize)]
struct Placed {
    variables: Entries,
}

/// The table, each entry with where it stands.
#[derive(Deserialize)]
struct Entries {
    process: Spanned<u32>,
    order: Option<Spanned<Value>>,
    session: Option<Spanned<Value>>,
    #[serde(default)]
    member: Vec<Spanned<Member>>,
    #[serde(default)]
    variable: Vec<Spanned<Definition>>,
    etcd: Option<Spanned<Value>>,
}

/// The byte of `text` where the entry begins that was refused with `message`; none if
/// that was not about a relation between entries, or is about all of them.
pub(crate) fn place_of(text: &str, message: &str) -> Option<usize> {
    let whole: File = toml::from_str(text).ok()?;
    let table: Result<VariablesConfig, _> = whole.variables.into_inner().try_into();
    // The same table alone: whatever else is in the file, this is what was refused.
    if table.err()?.message() != message {
        return None;
    }
    let entries = toml::from_str::<Placed>(text).ok()?.variables;
    let mut config = VariablesConfig::new(*entries.process.get_ref());
    let members = entries.member.iter().map(Spanned::get_ref);
    config.members = members.cloned().collect();
    let variables = entries.variable.iter().map(Spanned::get_ref);
    config.variables = variables.cloned().collect();
    let found = config.check().err();
    entries.place(found.as_ref(), message)
}

impl Entries {
    /// `found` is what is wrong with members and variables alone.
    fn place(&self, found: Option<&VariablesError>, message: &str) -> Option<usize> {
        let start = |value: &Spanned<Value>| value.span().start;
        if message.starts_with("session ") {
            return self.session.as_ref().map(start);
        }
        if message.contains("etcd") {
            return self.etcd.as_ref().or(self.order.as_ref()).map(start);
        }
        match found? {
            VariablesError::NoMember { key, .. } if &**key == "process" => {
                Some(self.process.span().start)
            }
            VariablesError::NoMember { key, .. } => {
                let named =
                    |one: &Definition| **key == format!("variable {}: subscribers", one.name);
                place_where(&self.variable, named)
            }
            VariablesError::NoSubscribers { name } => {
                place_where(&self.variable, |one| one.name == *name)
            }
            VariablesError::Twice {
                key: "member",
                what,
            } => second_where(&self.member, |one| {
                **what == format!("id {}", one.id) || **what == format!("address {}", one.address)
            }),
            VariablesError::Twice { what, .. } => second_where(&self.variable, |one| {
                **what == format!("id {}", one.id) || **what == format!("name {}", one.name)
            }),
            _ => None,
        }
    }
}

fn place_where<T>(all: &[Spanned<T>], wanted: impl Fn(&T) -> bool) -> Option<usize> {
    let mut found = all.iter().filter(|one| wanted(one.get_ref()));
    Some(found.next()?.span().start)
}

fn second_where<T>(all: &[Spanned<T>], wanted: impl Fn(&T) -> bool) -> Option<usize> {
    let mut found = all.iter().filter(|one| wanted(one.get_ref()));
    Some(found.nth(1)?.span().start)
}

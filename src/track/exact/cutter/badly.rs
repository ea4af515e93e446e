//! Cuts made in ways that tear, for controls: a test that finds none of them torn does
//! not see what it is there for.

use super::{Cut, Cutter, Ground};

/// What is done wrong in the withheld pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Badly {
    /// Faults are answered while pages are armed.
    AnswersWhileArming,
    /// Faults are answered between two attachments.
    PerAttachment,
    /// Hot pages are left open, as in the rounds before.
    SkipsHotPages,
}

impl Cutter {
    /// As [`Cutter::cut`], done wrong.
    pub(crate) fn cut_badly<G: Ground>(
        &mut self,
        ground: &mut G,
        all: bool,
        how: Badly,
    ) -> Result<Cut, G::Error> {
        self.retry(ground)?;
        self.arming = true;
        let all = all || self.attachments.iter().any(|it| it.all_open);
        if all {
            self.arm_everything(ground)?;
        }
        for attachment in 0..self.attachments.len() {
            let mut at = 0;
            let skip_hot = how == Badly::SkipsHotPages;
            while let Some(run) = self.next_open(attachment, at, skip_hot) {
                at = run.end;
                self.attachments[attachment].open.remove(run.clone());
                ground.protect(attachment, run)?;
                if how == Badly::AnswersWhileArming {
                    self.look(ground)?;
                }
            }
            if how == Badly::PerAttachment {
                self.look(ground)?;
            }
        }
        let cut = self.take_dirty(all);
        self.arming = false;
        self.board.publish(cut);
        Ok(cut)
    }
}

//! The cutter on plain memory: writers, engine and cutter interleaved by a seeded
//! generator at every call to the ground, and every cut checked to be a prefix of what
//! each writer stored. The controls do what must tear, and have to be caught.

use std::collections::VecDeque;
use std::sync::Arc;

use super::*;

const PAGES: usize = 48;
/// Writers, and so words of a page.
const WRITERS: usize = 4;

type Page = [u64; WRITERS];

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// A writer stores 1, 2, 3, ... into its word of one page after the other.
struct Writer {
    attachment: usize,
    stores: Vec<u8>,
    /// The page that its next store waits for, once the cutter has been told.
    waits: Option<usize>,
    in_order: bool,
}

enum Capture {
    Idle,
    Running {
        cut: Cut,
        at: u64,
        copied: Option<(u64, Page)>,
        early: Vec<u64>,
    },
}

/// Plain memory with writers, and an engine that captures it.
struct World {
    board: Arc<Board>,
    memory: Vec<Page>,
    armed: Vec<Vec<bool>>,
    faults: VecDeque<(usize, u64)>,
    writers: Vec<Writer>,
    twin: Vec<Page>,
    capture: Capture,
    captured: u64,
    void: u64,
    torn: u64,
    random: Random,
    clock: u64,
    /// The engine does nothing at all.
    stalled: bool,
    hot: bool,
    /// Attachments whose process is gone.
    gone: Vec<bool>,
}

impl World {
    fn new(seed: u64, attachments: usize, slots: u32) -> (World, Cutter) {
        let board = Arc::new(Board::with_slots(PAGES as u64 * 4096, slots).expect("a board"));
        let cutter = Cutter::new(Arc::clone(&board), attachments).expect("a cutter");
        let writers = (0..WRITERS)
            .map(|number| Writer {
                attachment: number % attachments,
                stores: Vec::new(),
                waits: None,
                in_order: number == 3,
            })
            .collect();
        let world = World {
            board,
            memory: vec![[0; WRITERS]; PAGES],
            armed: vec![vec![false; PAGES]; attachments],
            faults: VecDeque::new(),
            writers,
            twin: vec![[0; WRITERS]; PAGES],
            capture: Capture::Idle,
            captured: 0,
            void: 0,
            torn: 0,
            random: Random(seed * 2 + 1),
            clock: 0,
            stalled: false,
            hot: false,
            gone: vec![false; attachments],
        };
        (world, cutter)
    }

    /// Whatever runs beside the cutter.
    fn others(&mut self) {
        for _ in 0..self.random.below(6) {
            match self.random.below(8) {
                0..=5 => self.store(),
                _ if !self.stalled => self.engine(),
                _ => {}
            }
        }
    }

    fn store(&mut self) {
        let number = self.random.below(WRITERS as u64) as usize;
        let writer = &mut self.writers[number];
        if self.gone[writer.attachment] {
            return;
        }
        let count = writer.stores.len();
        let page = if writer.in_order {
            count / 3 % PAGES
        } else if self.hot && count.is_multiple_of(2) {
            number
        } else {
            // The same page until the store has gone through.
            (count as u64 * 0x9E37_79B9 + number as u64 * 7) as usize % 4093 % PAGES
        };
        if self.armed[writer.attachment][page] {
            if writer.waits.is_none() {
                writer.waits = Some(page);
                self.faults.push_back((writer.attachment, page as u64));
            }
            return;
        }
        writer.waits = None;
        writer.stores.push(page as u8);
        self.memory[page][number] = writer.stores.len() as u64;
    }

    fn engine(&mut self) {
        match std::mem::replace(&mut self.capture, Capture::Idle) {
            Capture::Idle => {
                let made = self.board.made();
                if made.number > self.captured {
                    self.capture = Capture::Running {
                        cut: made,
                        at: 0,
                        copied: None,
                        early: Vec::new(),
                    };
                } else if made.number == 0 || self.random.below(10) == 0 {
                    let all = made.number == 0
                        || self.board.is_void(made.number)
                        || self.random.below(40) == 0;
                    self.board.ask(all);
                }
            }
            Capture::Running {
                cut,
                at,
                copied,
                early,
            } => self.capture_on(cut, at, copied, early),
        }
    }

    fn slot(&self, slot: u32) -> Page {
        let mut bytes = [0; 8 * WRITERS];
        self.board.read_slot(slot, &mut bytes);
        let mut page = [0; WRITERS];
        for (word, bytes) in page.iter_mut().zip(bytes.chunks(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().expect("eight"));
        }
        page
    }

    fn capture_on(
        &mut self,
        cut: Cut,
        mut at: u64,
        mut copied: Option<(u64, Page)>,
        mut early: Vec<u64>,
    ) {
        let set = self.board.set(cut.number);
        if let Some((page, live)) = copied.take() {
            let content = match self.board.word(page).saved() {
                _ if early.contains(&page) => self.twin[page as usize],
                Some(slot) => self.slot(slot),
                None => live,
            };
            self.twin[page as usize] = content;
            if cut.all {
                if let Some(slot) = self.board.word(page).saved() {
                    self.board.release(page, slot);
                }
                self.board.walked(page + 1);
            } else {
                self.board.settle(page);
            }
            at = page + 1;
        } else if self.random.below(3) == 0
            && let Some((page, slot)) = self.board.next_saved()
        {
            if !(cut.all && page < at) {
                self.twin[page as usize] = self.slot(slot);
                early.push(page);
                if !cut.all {
                    set.remove(page..page + 1);
                }
            }
            self.board.release(page, slot);
        } else {
            let next = if cut.all {
                (at < PAGES as u64).then_some(at)
            } else {
                set.next(at)
            };
            match next {
                Some(page) => copied = Some((page, self.memory[page as usize])),
                None => {
                    self.end(cut);
                    return;
                }
            }
        }
        self.capture = Capture::Running {
            cut,
            at,
            copied,
            early,
        };
    }

    fn end(&mut self, cut: Cut) {
        let void = self.board.is_void(cut.number);
        self.board.finish(cut.number);
        self.captured = cut.number;
        if void {
            self.void += 1;
            self.board.ask(true);
            return;
        }
        for number in 0..WRITERS {
            let last = self.twin.iter().map(|page| page[number]).max();
            let last = last.expect("there are pages") as usize;
            let mut expected = [0; PAGES];
            for (store, page) in self.writers[number].stores[..last].iter().enumerate() {
                expected[*page as usize] = store as u64 + 1;
            }
            if (0..PAGES).any(|page| self.twin[page][number] != expected[page]) {
                self.torn += 1;
                return;
            }
        }
    }

    /// Runs until `cuts` were captured.
    fn run(&mut self, cutter: &mut Cutter, cuts: u64, cut: Make) {
        let mut turns = 0u64;
        while self.captured < cuts {
            turns += 1;
            assert!(turns < 3_000_000, "no progress at cut {}", self.captured);
            self.turn(cutter, cut);
        }
    }

    /// A process dies, or one comes, with its mapping armed or, as it may not, open.
    fn come_or_go(&mut self, cutter: &mut Cutter, armed: bool) {
        let attachment = self.random.below(self.gone.len() as u64) as usize;
        if self.gone[attachment] {
            self.armed[attachment] = vec![armed; PAGES];
            let newcomer = Armed::new(PAGES as u64, true).expect("room");
            cutter.join(attachment, newcomer);
        } else {
            self.armed[attachment] = vec![false; PAGES];
            self.faults.retain(|(of, _)| *of != attachment);
            for writer in &mut self.writers {
                if writer.attachment == attachment {
                    writer.waits = None;
                }
            }
            cutter.forget(attachment);
        }
        self.gone[attachment] = !self.gone[attachment];
    }

    /// One turn of the fault thread.
    fn turn(&mut self, cutter: &mut Cutter, cut: Make) {
        self.others();
        if let Some(wanted) = cutter.wanted() {
            cut(cutter, self, wanted.all);
        } else if cutter.has_room()
            && let Some((attachment, page)) = self.next_fault().expect("never fails")
        {
            cutter.fault(self, attachment, page).expect("never fails");
        }
        cutter.retry(self).expect("never fails");
    }
}

impl Ground for World {
    type Error = std::convert::Infallible;

    fn protect(&mut self, attachment: usize, pages: Range<u64>) -> Result<(), Self::Error> {
        for page in pages {
            self.others();
            self.armed[attachment][page as usize] = true;
        }
        self.others();
        Ok(())
    }

    fn lift(&mut self, attachment: usize, pages: Range<u64>) -> Result<(), Self::Error> {
        self.others();
        for page in pages {
            self.armed[attachment][page as usize] = false;
            for writer in &mut self.writers {
                if writer.attachment == attachment && writer.waits == Some(page as usize) {
                    writer.waits = None;
                }
            }
        }
        self.others();
        Ok(())
    }

    fn save(&mut self, page: u64, slot: u32) {
        self.others();
        let content: Vec<u8> = self.memory[page as usize]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        self.board.write_slot(slot, &content);
        self.others();
    }

    fn next_fault(&mut self) -> Result<Option<(usize, u64)>, Self::Error> {
        self.others();
        Ok(self.faults.pop_front())
    }

    fn now_ns(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

type Make = fn(&mut Cutter, &mut World, bool);

fn well(cutter: &mut Cutter, world: &mut World, all: bool) {
    cutter.cut(world, all).expect("never fails");
}

fn torn(attachments: usize, hot: bool, cut: Make) -> u64 {
    let mut torn = 0;
    for seed in 1..=20 {
        let (mut world, mut cutter) = World::new(seed, attachments, PAGES as u32);
        world.hot = hot;
        world.run(&mut cutter, 100, cut);
        torn += world.torn;
    }
    torn
}

#[test]
fn no_cut_is_torn() {
    for attachments in [1, 2, 4] {
        for hot in [false, true] {
            assert_eq!(torn(attachments, hot, well), 0, "{attachments} attachments");
        }
    }
}

#[test]
fn no_cut_is_torn_with_few_slots() {
    for slots in [1, 2, 5] {
        for seed in 1..=20 {
            let (mut world, mut cutter) = World::new(seed, 2, slots);
            world.run(&mut cutter, 60, well);
            assert_eq!(world.torn, 0, "{slots} slots, seed {seed}");
            assert_eq!(world.void, 0, "the clock stands almost still");
            assert!(world.board.stats().slots_used <= slots.into());
        }
    }
}

#[test]
fn a_cut_is_void_when_the_engine_stalls_and_the_next_is_whole_again() {
    let (mut world, mut cutter) = World::new(5, 2, 2);
    cutter.set_stall(40);
    for round in 1..=20 {
        let before = world.captured;
        world.run(&mut cutter, before + 3, well);
        while !matches!(world.capture, Capture::Running { .. }) {
            world.turn(&mut cutter, well);
        }
        world.stalled = true;
        for _ in 0..3_000 {
            world.turn(&mut cutter, well);
            assert!(cutter.parked.len() <= WRITERS);
        }
        assert!(
            !cutter.is_starved(),
            "stores wait for ever in round {round}"
        );
        world.stalled = false;
    }
    let before = world.captured;
    world.run(&mut cutter, before + 20, well);
    assert!(world.void > 0, "no cut was given up");
    assert_eq!(world.torn, 0);
}

/// Cuts while processes come and go all the time; how many are torn.
fn torn_in_a_crowd(armed: bool) -> u64 {
    let mut torn = 0;
    for seed in 1..=20 {
        let (mut world, mut cutter) = World::new(seed, WRITERS, PAGES as u32);
        world.run(&mut cutter, 1, well);
        let mut turns = 0u64;
        while world.captured < 100 {
            turns += 1;
            assert!(turns < 3_000_000, "no progress at cut {}", world.captured);
            if world.random.below(50) == 0 {
                world.come_or_go(&mut cutter, armed);
            }
            world.turn(&mut cutter, well);
        }
        torn += world.torn;
    }
    torn
}

#[test]
fn no_cut_is_torn_while_writers_come_and_go() {
    assert_eq!(torn_in_a_crowd(true), 0);
}

#[test]
fn control_writers_that_come_without_having_armed_tear() {
    assert!(
        torn_in_a_crowd(false) > 0,
        "none torn: the check sees nothing"
    );
}

#[test]
fn all_slots_come_back() {
    let (mut world, mut cutter) = World::new(9, 1, 16);
    world.run(&mut cutter, 200, well);
    // Without a store the last captures leave nothing behind.
    world.writers.clear();
    let board = Arc::clone(&world.board);
    for _ in 0..3 {
        cutter.cut(&mut Still, true).expect("never fails");
        let made = board.made();
        board.walked(PAGES as u64);
        board.finish(made.number);
    }
    let mut slots = cutter.stash.clone();
    while let Some(slot) = board.free_slot() {
        slots.push(slot);
    }
    slots.sort_unstable();
    assert_eq!(slots, (0..16).collect::<Vec<_>>());
    assert_eq!(board.stats().slots_used, 0);
}

/// A ground on which nothing happens.
struct Still;

impl Ground for Still {
    type Error = std::convert::Infallible;
    fn protect(&mut self, _: usize, _: Range<u64>) -> Result<(), Self::Error> {
        Ok(())
    }
    fn lift(&mut self, _: usize, _: Range<u64>) -> Result<(), Self::Error> {
        Ok(())
    }
    fn save(&mut self, _: u64, _: u32) {}
    fn next_fault(&mut self) -> Result<Option<(usize, u64)>, Self::Error> {
        Ok(None)
    }
    fn now_ns(&mut self) -> u64 {
        0
    }
}

#[test]
fn control_faults_answered_while_arming_tear() {
    let served: Make = |cutter, world, all| {
        let cut = cutter.cut_badly(world, all, Badly::AnswersWhileArming);
        cut.expect("never fails");
    };
    assert!(
        torn(1, false, served) > 0,
        "none torn: the check sees nothing"
    );
}

#[test]
fn control_answering_one_attachment_before_the_next_is_armed_tears() {
    let served: Make = |cutter, world, all| {
        let cut = cutter.cut_badly(world, all, Badly::PerAttachment);
        cut.expect("never fails");
    };
    assert!(
        torn(2, false, served) > 0,
        "none torn: the check sees nothing"
    );
}

#[test]
fn control_hot_pages_left_out_of_the_withheld_pass_tear() {
    let skipping: Make = |cutter, world, all| {
        let cut = cutter.cut_badly(world, all, Badly::SkipsHotPages);
        cut.expect("never fails");
    };
    assert!(
        torn(1, true, skipping) > 0,
        "none torn: the check sees nothing"
    );
}

#[test]
fn pages_opened_in_order_come_in_growing_windows() {
    let board = Arc::new(Board::with_slots(200 * 4096, 8).expect("a board"));
    let mut cutter = Cutter::new(Arc::clone(&board), 1).expect("a cutter");
    cutter.cut(&mut Still, true).expect("never fails");
    board.finish(1);
    let mut faults = 0;
    let mut page = 0;
    while page < 200 {
        if !cutter.attachments[0].open.contains(page) {
            cutter.fault(&mut Still, 0, page).expect("never fails");
            faults += 1;
        }
        page += 1;
    }
    assert!(faults <= 9, "{faults} faults for 200 pages in order");
    assert_eq!(board.stats().dirty_pages, 200);
}

/// A region that may grow is armed up to its greatest size, and to look at a page without
/// memory ends the process.
#[test]
fn no_window_is_opened_over_pages_without_memory() {
    let board = Arc::new(Board::with_slots(200 * 4096, 8).expect("a board"));
    board.set_present(50);
    let mut cutter = Cutter::new(Arc::clone(&board), 1).expect("a cutter");
    cutter.cut(&mut Still, true).expect("never fails");
    board.finish(1);
    for page in 0..50 {
        if !cutter.attachments[0].open.contains(page) {
            cutter.fault(&mut Still, 0, page).expect("never fails");
        }
    }
    assert!(!cutter.attachments[0].open.contains(50));
    // A store that was seen shows that there is memory, for that page alone.
    cutter.fault(&mut Still, 0, 50).expect("never fails");
    assert!(!cutter.attachments[0].open.contains(51));
    board.set_present(200);
    cutter.fault(&mut Still, 0, 51).expect("never fails");
    assert!(cutter.attachments[0].open.contains(52));
}

#[test]
fn hot_pages_are_counted_and_cool_down() {
    let board = Arc::new(Board::with_slots(200 * 4096, 8).expect("a board"));
    let mut cutter = Cutter::new(Arc::clone(&board), 1).expect("a cutter");
    cutter.cut(&mut Still, true).expect("never fails");
    board.finish(1);
    for round in 1..=8 {
        cutter.fault(&mut Still, 0, 7).expect("never fails");
        cutter
            .fault(&mut Still, 0, round * 10)
            .expect("never fails");
        let cut = cutter.cut(&mut Still, false).expect("never fails");
        board.finish(cut.number);
        let hot = u64::from(round >= limits::HOT_CUTS);
        assert_eq!(board.stats().hot_pages, hot, "after {round} cuts");
        assert_eq!(cutter.is_hot(7), hot == 1);
    }
    let cut = cutter.cut(&mut Still, false).expect("never fails");
    board.finish(cut.number);
    assert_eq!(board.stats().hot_pages, 0);
    assert!(!cutter.is_hot(7));
}

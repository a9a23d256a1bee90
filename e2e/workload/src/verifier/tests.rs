//! The verifier itself: it is content with a file system that works, and finds each kind of damage.

use super::content::{RECORD, SLOT, Value};
use super::data::{DataFile, SLOTS, offset};
use super::files::{names_folder, path_of_data, path_of_log, walk};
use super::journal::Step;
use super::logs::{APPENDED, LOCKED, append_start, locked_place};
use super::names::Tree;
use super::*;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::Instant;

const CHUNK: u64 = 1 << 20;
/// About half a slot, of whole words.
const HALF: usize = 2048;

/// A volume (a folder, mounted twice, as it were) on which the verifier has run.
struct Volume {
    dir: tempfile::TempDir,
}

impl Volume {
    fn run(seed: u64, operations: u64) -> Self {
        let volume = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(volume.mount()).unwrap();
        volume.go_on(seed, operations);
        volume
    }

    fn mount(&self) -> PathBuf {
        self.dir.path().join("volume")
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    fn go_on(&self, seed: u64, operations: u64) {
        let mut plan = Plan::new(vec![self.mount(), self.mount()], self.model(), seed);
        plan.chunk = CHUNK;
        plan.rest = Duration::ZERO;
        let running = plan.start().unwrap();
        let (deadline, mut done) = (Instant::now() + Duration::from_secs(60), 0);
        while done < operations {
            assert!(Instant::now() < deadline, "{done} of {operations} operations");
            std::thread::sleep(Duration::from_millis(5));
            let stalls = running.stalls();
            assert_eq!(stalls.failures, []);
            done += stalls.operations();
        }
        let report = running.stop().unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
    }

    fn problems(&self) -> Vec<String> {
        check(&self.mount(), &self.model(), CHUNK).unwrap().problems
    }

    /// Exactly one problem, about this.
    fn assert_found(&self, words: &str) {
        let problems = self.problems();
        assert!(
            problems.iter().any(|problem| problem.contains(words)),
            "{words}: {problems:?}"
        );
    }

    fn model_of(&self, worker: u32) -> journal::Model {
        replay(&self.model(), worker, CHUNK).unwrap()
    }

    /// A data file that is there, and a slot that was written.
    fn written_slot(&self) -> (File, u32) {
        for worker in 0..4 {
            for (id, data) in self.model_of(worker).data {
                let path = path_of_data(&self.mount(), worker, id);
                if data.exists != Some(true) {
                    continue;
                }
                let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
                let written = (0..SLOTS).find(|slot| {
                    let mut word = [0; 8];
                    let place = offset(CHUNK, *slot);
                    // Whole slots only: one that was cut may end in zeros.
                    file.read_exact_at(&mut word, place + SLOT as u64 - 8).is_ok() && word != [0; 8]
                });
                if let Some(slot) = written {
                    return (file, slot);
                }
            }
        }
        panic!("nothing was written");
    }
}

#[test]
fn a_file_system_that_works_has_no_problems() {
    let volume = Volume::run(1, 4000);
    assert_eq!(volume.problems(), Vec::<String>::new());
    // The model goes on where it ended.
    volume.go_on(2, 2000);
    let checked = check(&volume.mount(), &volume.model(), CHUNK).unwrap();
    assert_eq!(checked.problems, Vec::<String>::new());
    assert_eq!(checked.doubts, 0);
    assert!(checked.files > 20 && checked.records > 50, "{checked:?}");
}

#[test]
fn the_same_seed_does_the_same() {
    let (one, two) = (Volume::run(7, 1500), Volume::run(7, 1500));
    for worker in 0..4 {
        let read = |volume: &Volume| fs::read_to_string(volume.model().join(format!("worker-{worker}.jsonl"))).unwrap();
        // Places in the locked log depend on who came first.
        let steps = |text: &str| -> Vec<String> {
            text.lines()
                .filter(|line| line.contains("\"Do\":"))
                .map(str::to_owned)
                .collect()
        };
        let (one, two) = (steps(&read(&one)), steps(&read(&two)));
        let begin = one.len().min(two.len()) * 9 / 10;
        assert!(begin > 50, "{begin}");
        assert_eq!(one[..begin], two[..begin]);
    }
}

#[test]
fn damage_to_data_is_found() {
    let volume = Volume::run(3, 3000);
    let (file, slot) = volume.written_slot();
    let at = offset(CHUNK, slot);
    let mut good = vec![0; SLOT];
    file.read_exact_at(&mut good, at).unwrap();

    // Lost.
    file.write_all_at(&vec![0; SLOT], at).unwrap();
    volume.assert_found(&format!("slot {slot}: found zeros"));
    // Torn: the first half is of this write, the second of none.
    file.write_all_at(&good[..HALF], at).unwrap();
    volume.assert_found(&format!("slot {slot}: found 0x0 at byte {}", HALF));
    // A flipped bit.
    good[HALF] ^= 1;
    file.write_all_at(&good, at).unwrap();
    volume.assert_found(&format!("slot {slot}: found"));
    good[HALF] ^= 1;
    file.write_all_at(&good, at).unwrap();
    assert_eq!(volume.problems(), Vec::<String>::new());
    // In the wrong place.
    let elsewhere = offset(CHUNK, if slot == 0 { 1 } else { slot - 1 });
    let mut kept = vec![0; SLOT];
    file.read_exact_at(&mut kept, elsewhere).unwrap();
    file.write_all_at(&good, elsewhere).unwrap();
    volume.assert_found("slot");
    file.write_all_at(&kept, elsewhere).unwrap();
    // Longer than it should be, and something where nothing was written.
    let size = file.metadata().unwrap().len();
    file.set_len(size + 1).unwrap();
    volume.assert_found("bytes, expected");
    file.set_len(size).unwrap();
    file.write_all_at(b"x", offset(CHUNK, 15) + SLOT as u64 + 5).unwrap();
    volume.assert_found("were never written");
}

#[test]
fn damage_to_names_is_found() {
    let volume = Volume::run(4, 3000);
    let (worker, path) = (0..4)
        .find_map(|worker| {
            let names = volume.model_of(worker).tree.names;
            let file = names.iter().find(|(_, entry)| !entry.folder)?;
            Some((worker, names_folder(&volume.mount(), worker).join(file.0)))
        })
        .unwrap();
    let content = fs::read(&path).unwrap();

    fs::remove_file(&path).unwrap();
    volume.assert_found("is lost");
    fs::write(&path, &content[..content.len() - 8]).unwrap();
    volume.assert_found("is damaged");
    fs::write(&path, &content).unwrap();
    // Back from the dead.
    let dead = path.with_file_name("n99");
    fs::copy(&path, &dead).unwrap();
    volume.assert_found("n99 is there and must not be");
    fs::remove_file(&dead).unwrap();
    let gone = volume
        .model_of(worker)
        .data
        .into_iter()
        .find(|(_, data)| data.exists == Some(false));
    if let Some((id, _)) = gone {
        File::create(path_of_data(&volume.mount(), worker, id)).unwrap();
        volume.assert_found("is back");
    }
    File::create(path_of_data(&volume.mount(), worker, 5)).unwrap();
    volume.assert_found("f5 was never made");
}

#[test]
fn damage_to_logs_is_found() {
    let volume = Volume::run(5, 3000);
    let path = path_of_log(&volume.mount(), APPENDED);
    let log = fs::read(&path).unwrap();
    let (start, last) = (append_start(CHUNK) as usize, log.len() - RECORD);
    assert!(last > start + 10 * RECORD);

    // Doubled.
    fs::write(&path, [&log[..], &log[last..]].concat()).unwrap();
    volume.assert_found("comes too late or twice");
    // Lost.
    fs::write(&path, &log[..last]).unwrap();
    volume.assert_found("is lost");
    fs::write(&path, [&log[..start], &log[start + RECORD..]].concat()).unwrap();
    volume.assert_found("is lost");
    // Torn.
    fs::write(&path, &log[..log.len() - 1]).unwrap();
    volume.assert_found("no whole records");
    let mut torn = log.clone();
    torn[last + 30..].fill(0);
    fs::write(&path, &torn).unwrap();
    volume.assert_found("torn");
    fs::write(&path, &log).unwrap();
    assert_eq!(volume.problems(), Vec::<String>::new());

    let locked = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path_of_log(&volume.mount(), LOCKED))
        .unwrap();
    let count = logs::count(&locked).unwrap();
    assert!(count > 5);
    let mut record = vec![0; RECORD];
    locked
        .read_exact_at(&mut record, locked_place(CHUNK, count - 1))
        .unwrap();
    // The last record over the one before.
    locked.write_all_at(&record, locked_place(CHUNK, count - 2)).unwrap();
    volume.assert_found("is also record");
    locked.write_all_at(&(count - 1).to_le_bytes(), 0).unwrap();
    volume.assert_found("expected Some");
}

#[test]
fn a_lock_that_two_hold_is_found() {
    let mut locked = logs::Locked::default();
    locked.acknowledged(0, 1, 10).unwrap();
    locked.acknowledged(1, 2, 11).unwrap();
    assert_eq!(locked.count, 2);
    assert!(locked.acknowledged(1, 1, 12).is_err());
}

/// A data file with one slot in play.
struct OneSlot {
    data: DataFile,
}

impl OneSlot {
    const ID: u64 = 9;

    fn new() -> Self {
        Self {
            data: DataFile::new(0, CHUNK),
        }
    }

    fn write(&mut self, seq: u64, ok: bool) {
        self.data.write_issued(3..4, seq);
        self.data.write_answered(3..4, ok);
    }

    /// What a read through `mount` says that finds the write `seq` (0: zeros).
    fn read(&mut self, mount: usize, seq: u64) -> Result<(), String> {
        let floors = self.data.floors(3..4, mount == self.data.mount, true);
        self.data.judge(Self::ID, &floors, &Self::content(seq))
    }

    fn content(seq: u64) -> Vec<u8> {
        let place = content::Place {
            file: Self::ID,
            slot: 3,
        };
        if seq == 0 {
            vec![0; SLOT]
        } else {
            content::bytes(place, seq, SLOT)
        }
    }
}

#[test]
fn stale_reads_are_found() {
    let mut slot = OneSlot::new();
    slot.write(1, true);
    // On its own mount a write is seen at once, elsewhere after fsync.
    slot.read(0, 1).unwrap();
    assert!(slot.read(0, 0).is_err());
    slot.read(1, 0).unwrap();
    slot.data.sync_answered(true);
    assert!(slot.read(1, 0).is_err());
    slot.read(1, 1).unwrap();

    // What another mount has seen stays.
    slot.write(2, true);
    slot.read(1, 1).unwrap();
    slot.read(1, 2).unwrap();
    assert!(slot.read(1, 1).is_err());

    // Where disks may be full a write may be lost before it is durable, though its own mount has shown it.
    slot.write(4, true);
    let own = slot.data.floors(3..4, true, false);
    slot.data.judge(OneSlot::ID, &own, &OneSlot::content(4)).unwrap();
    slot.data.judge(OneSlot::ID, &own, &OneSlot::content(2)).unwrap();
    assert!(slot.data.judge(OneSlot::ID, &own, &OneSlot::content(1)).is_err());
    slot.read(1, 2).unwrap();

    // A read that began before the write was published may see either.
    slot.write(5, true);
    let before = slot.data.floors(3..4, false, true);
    slot.data.sync_answered(true);
    slot.data.judge(OneSlot::ID, &before, &OneSlot::content(2)).unwrap();
    slot.data.judge(OneSlot::ID, &before, &OneSlot::content(5)).unwrap();
    assert!(slot.data.judge(OneSlot::ID, &before, &OneSlot::content(1)).is_err());
}

#[test]
fn what_was_not_durable_may_be_lost_with_its_mount() {
    let mut slot = OneSlot::new();
    slot.write(1, true);
    slot.data.sync_answered(true);
    slot.write(2, true);
    slot.data.mount_lost();
    slot.read(1, 1).unwrap();
    slot.read(0, 2).unwrap();
    // Half of it may be there as well.
    let half = [&OneSlot::content(2)[..2048], &OneSlot::content(1)[2048..]].concat();
    let floors = slot.data.floors(3..4, true, true);
    slot.data.judge(OneSlot::ID, &floors, &half).unwrap();
    assert!(slot.read(1, 0).is_err());
    // An fsync after that says nothing about it, a new write that is made durable does.
    slot.data.sync_answered(true);
    slot.read(1, 1).unwrap();
    slot.write(3, true);
    slot.data.sync_answered(true);
    assert!(slot.read(1, 1).is_err() && slot.read(1, 2).is_err());
    slot.read(1, 3).unwrap();
}

#[test]
fn a_write_that_fails_may_tell_of_an_earlier_one() {
    let mut slot = OneSlot::new();
    slot.write(1, true);
    slot.data.write_issued(7..8, 2);
    slot.data.write_answered(7..8, false);
    slot.data.sync_answered(true);
    slot.read(1, 0).unwrap();
    slot.read(1, 1).unwrap();
}

#[test]
fn truncations_count() {
    let mut slot = OneSlot::new();
    slot.write(1, true);
    slot.data.sync_answered(true);
    let cut = offset(CHUNK, 3) + 800;
    slot.data.truncate_issued(cut);
    slot.data.truncate_answered(cut, true);
    assert!(slot.read(1, 1).is_err());
    let left = [&OneSlot::content(1)[..800], &vec![0; SLOT - 800]].concat();
    let floors = slot.data.floors(3..4, false, true);
    slot.data.judge(OneSlot::ID, &floors, &left).unwrap();
    slot.data.truncate_issued(0);
    slot.data.truncate_answered(0, false);
    slot.read(1, 0).unwrap();
    slot.data.judge(OneSlot::ID, &floors, &left).unwrap();
    assert_eq!(Value::ZEROS.to_string(), "zeros");
}

#[test]
fn an_operation_in_doubt_happened_as_a_whole_or_not() {
    let mut tree = Tree::default();
    let create = |path: &str, id| Step::Create { path: path.into(), id };
    let rename = |from: &str, to: &str| Step::Rename {
        from: from.into(),
        to: to.into(),
    };
    tree.end(&create("a", 1), true);
    tree.end(&create("b", 2), true);
    tree.end(
        &Step::Mkdir {
            path: "d".into(),
            id: 3,
        },
        true,
    );
    tree.end(&create("d/c", 4), true);
    tree.end(&rename("a", "b"), false);
    tree.end(&rename("d", "e"), false);
    assert!(tree.doubtful("b") && tree.doubtful("e/c") && tree.doubtful("d"));

    let dir = tempfile::tempdir().unwrap();
    let put = |path: &str, id: u64| fs::write(dir.path().join(path), content::small(id)).unwrap();
    let problems = || tree.judge(&walk(dir.path()).unwrap());
    put("a", 1);
    put("b", 2);
    fs::create_dir(dir.path().join("d")).unwrap();
    put("d/c", 4);
    assert_eq!(problems(), Vec::<String>::new());
    fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
    fs::rename(dir.path().join("d"), dir.path().join("e")).unwrap();
    assert_eq!(problems(), Vec::<String>::new());
    // Neither: both names, or none.
    put("a", 1);
    assert_eq!(problems().len(), 1);
    fs::remove_file(dir.path().join("a")).unwrap();
    fs::remove_file(dir.path().join("b")).unwrap();
    assert_eq!(problems().len(), 1);
}

#[test]
fn what_was_issued_and_never_answered_is_in_doubt() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path(), 0).unwrap();
    let step = |seq| Step::Append { seq, mount: 0 };
    journal.begin(&step(1)).unwrap();
    journal.end(Ok(0)).unwrap();
    journal.begin(&Step::SyncLog { mount: 0 }).unwrap();
    journal.end(Ok(0)).unwrap();
    journal.begin(&step(2)).unwrap();
    journal.end(Err(5)).unwrap();
    journal.begin(&step(3)).unwrap();
    let model = replay(dir.path(), 0, CHUNK).unwrap();
    let sure: Vec<_> = model.appended.iter().map(|(seq, record)| (*seq, record.sure)).collect();
    assert_eq!(sure, [(1, true), (2, false), (3, false)]);
    assert_eq!(model.last, 3);
}

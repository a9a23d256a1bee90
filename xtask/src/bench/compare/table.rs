//! The results as Markdown.

use super::cost::Cost;
use super::rows::{Sample, Turn, Unit};
use std::fmt::Write;

/// One system's turns.
pub(super) struct Results {
    pub(super) name: &'static str,
    pub(super) about: String,
    pub(super) turns: Vec<Turn>,
}

/// How large numbers are shown.
fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

impl Results {
    fn samples(&self, row: &str) -> impl Iterator<Item = &Sample> {
        let of_row = move |turn: &'_ &Turn| turn.samples.iter().any(|sample| sample.row == row);
        self.turns
            .iter()
            .filter(of_row)
            .flat_map(move |turn| turn.samples.iter().filter(move |sample| sample.row == row))
    }

    fn median(&self, row: &str, value: impl Fn(&Sample) -> f64) -> Option<f64> {
        median(self.samples(row).map(value))
    }

    /// Of whole turns.
    fn of_turns(&self, value: impl Fn(&Turn) -> f64) -> f64 {
        median(self.turns.iter().map(value)).unwrap_or(f64::NAN)
    }
}

/// Microseconds of one operation.
fn each(time: std::time::Duration, sample: &Sample) -> f64 {
    time.as_secs_f64() * 1e6 / sample.operations as f64
}

/// All tables. `base` is the number of the system that the others are compared with.
pub(super) fn markdown(results: &[Results], base: usize) -> String {
    let mut rows: Vec<(&str, Unit)> = Vec::new();
    for sample in results
        .iter()
        .flat_map(|result| &result.turns)
        .flat_map(|turn| &turn.samples)
    {
        if !rows.iter().any(|(row, _)| *row == sample.row) {
            rows.push((&sample.row, sample.unit));
        }
    }
    let mut out = Tables {
        results,
        text: String::new(),
    };
    let name = results[base].name;
    out.line(&format!(
        "Medians; in brackets how many times as good as **{name}** (above 1 is better, also for times).\n"
    ));
    out.head("row");
    for (row, unit) in &rows {
        let compared = results[base].median(row, |sample| sample.value);
        let unit_name = match unit {
            Unit::PerSecond => "/s",
            Unit::Megabytes => "MB/s",
            Unit::Seconds => "s",
        };
        out.row(&format!("{row} [{unit_name}]"), |result| {
            let Some(value) = result.median(row, |sample| sample.value) else {
                return "failed".into();
            };
            let ratio = compared.map(|compared| match unit {
                Unit::Seconds => compared / value,
                Unit::PerSecond | Unit::Megabytes => value / compared,
            });
            match ratio {
                Some(ratio) if result.name != name => format!("{} ({})", number(value), number(ratio)),
                _ => number(value),
            }
        });
    }

    if results.iter().any(|result| result.turns.len() > 1) {
        out.spread(&rows);
    }

    out.line("\nLatency, p50 / p99, µs.\n");
    out.head("row");
    for (row, _) in rows.iter().filter(|(row, _)| {
        let timed = |result: &Results| result.samples(row).any(|sample| sample.latency.is_some());
        results.iter().any(timed)
    }) {
        out.row(row, |result| {
            let quantile = |pick: fn(&(f64, f64)) -> f64| {
                let value = result.median(row, |sample| sample.latency.as_ref().map_or(f64::NAN, pick));
                value.map_or("–".into(), number)
            };
            format!("{} / {}", quantile(|pair| pair.0), quantile(|pair| pair.1))
        });
    }

    out.line(
        "\nProcessor time of one operation, µs: of the system's own processes (of the whole machine, with the \
         kernel and the benchmark). For programs, of one file or folder of the source tree.\n",
    );
    out.head("row");
    for (row, _) in &rows {
        out.row(row, |result| {
            let cost = |pick: fn(&Cost) -> std::time::Duration| {
                let value = result.median(row, |sample| each(pick(&sample.cost), sample));
                value.map_or("–".into(), number)
            };
            format!("{} ({})", cost(|cost| cost.system), cost(|cost| cost.machine))
        });
    }

    out.line("\nWhole turns.\n");
    out.head("");
    let seconds = |value: f64| number(value);
    out.row("seconds", |result| seconds(result.of_turns(|turn| turn.seconds)));
    out.row("processor seconds of the system", |result| {
        seconds(result.of_turns(|turn| turn.cost.system.as_secs_f64()))
    });
    out.row("processor seconds of the machine", |result| {
        seconds(result.of_turns(|turn| turn.cost.machine.as_secs_f64()))
    });
    let parts = results
        .iter()
        .flat_map(|result| &result.turns)
        .flat_map(|turn| &turn.left_over);
    let mut known = Vec::new();
    for (part, _) in parts {
        if known.contains(part) {
            continue;
        }
        known.push(*part);
        out.row(&format!("processor seconds left over after {part:?}"), |result| {
            seconds(result.of_turns(|turn| {
                let found = turn.left_over.iter().find(|(other, _)| other == part);
                found.map_or(0.0, |(_, time)| time.as_secs_f64())
            }))
        });
    }
    out.row("processors used by others meanwhile", |result| {
        seconds(result.of_turns(|turn| turn.others))
    });
    out.row("rows that failed", |result| {
        let failed: usize = result.turns.iter().map(|turn| turn.failures.len()).sum();
        failed.to_string()
    });

    out.line("\nMemory, MiB, of the last turn.\n");
    out.line("| system | program | processes | PSS of all at the end | RSS of the largest at the end | highest RSS |");
    out.line("|---|---|--:|--:|--:|--:|");
    for result in results {
        let programs = result.turns.last().into_iter().flat_map(|turn| turn.memory.programs());
        for (program, memory) in programs {
            let mib = |bytes: u64| number(bytes as f64 / f64::from(1 << 20));
            out.line(&format!(
                "| {} | {program} | {} | {} | {} | {} |",
                result.name,
                memory.processes,
                mib(memory.proportional),
                mib(memory.resident),
                mib(memory.peak)
            ));
        }
    }

    out.line("\nWhat was compared:");
    for result in results {
        out.line(&format!("- **{}**: {}", result.name, result.about));
    }
    for result in results {
        for (round, turn) in result.turns.iter().enumerate() {
            for failure in &turn.failures {
                out.line(&format!("- failed: {}, round {}: {failure}", result.name, round + 1));
            }
        }
    }
    out.text
}

struct Tables<'a> {
    results: &'a [Results],
    text: String,
}

impl Tables<'_> {
    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn head(&mut self, first: &str) {
        self.row(first, |result| result.name.to_owned());
        let columns = "--:|".repeat(self.results.len());
        self.line(&format!("|---|{columns}"));
    }

    fn spread(&mut self, rows: &[(&str, Unit)]) {
        self.line("\nSpread over the rounds: (most − least) / median.\n");
        self.head("row");
        for (row, _) in rows {
            self.row(row, |result| {
                let values = || result.samples(row).map(|sample| sample.value);
                let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(f64::MIN, f64::max));
                let share = median(values()).map(|median| (most - least) / median * 100.0);
                share.map_or("–".into(), |share| format!("{share:.0} %"))
            });
        }
    }

    fn row(&mut self, first: &str, cell: impl Fn(&Results) -> String) {
        let mut line = format!("| {first} |");
        for result in self.results {
            let _ = write!(line, " {} |", cell(result));
        }
        self.line(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn results(name: &'static str, values: &[f64], unit: Unit) -> Results {
        let turn = |value: &f64| Turn {
            samples: vec![Sample {
                row: "work".into(),
                unit,
                value: *value,
                operations: 10,
                cost: Cost {
                    system: Duration::from_micros(50),
                    machine: Duration::from_micros(120),
                    others: Duration::ZERO,
                },
                latency: Some((1.0, 9.0)),
            }],
            ..Turn::default()
        };
        Results {
            name,
            about: "1 copy".into(),
            turns: values.iter().map(turn).collect(),
        }
    }

    #[test]
    fn above_one_is_better_for_rates_and_for_times() {
        let of = |unit| [results("a", &[10.0, 30.0, 20.0], unit), results("b", &[5.0], unit)];
        let text = markdown(&of(Unit::PerSecond), 0);
        assert!(text.contains("| work [/s] | 20.0 | 5.00 (0.25) |"), "{text}");
        assert!(text.contains("| work | 100 % | 0 % |"), "{text}");
        assert!(text.contains("| work | 1.00 / 9.00 | 1.00 / 9.00 |"), "{text}");
        assert!(text.contains("| work | 5.00 (12.0) | 5.00 (12.0) |"), "{text}");
        let text = markdown(&of(Unit::Seconds), 0);
        assert!(text.contains("| work [s] | 20.0 | 5.00 (4.00) |"), "{text}");
    }

    #[test]
    fn what_failed_is_said() {
        let mut broken = results("b", &[], Unit::PerSecond);
        broken.turns.push(Turn {
            failures: vec!["work: disk full".into()],
            ..Turn::default()
        });
        let text = markdown(&[results("a", &[1.0], Unit::PerSecond), broken], 0);
        assert!(text.contains("| work [/s] | 1.00 | failed |"), "{text}");
        assert!(text.contains("failed: b, round 1: work: disk full"), "{text}");
    }
}

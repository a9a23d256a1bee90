use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// The types of a storage cluster's conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConditionType {
    /// All volumes can be served.
    Available,
    /// The objects are not yet as the spec wants them.
    Progressing,
    /// Something is broken or missing; the cluster may still be Available.
    Degraded,
    /// The operator leaves the cluster alone or has stopped it, as asked for in the spec.
    Paused,
}

impl ConditionType {
    /// All types, in the order in which they are shown.
    pub const ALL: [Self; 4] = [Self::Available, Self::Progressing, Self::Degraded, Self::Paused];

    /// The name in the status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Available => "Available",
            Self::Progressing => "Progressing",
            Self::Degraded => "Degraded",
            Self::Paused => "Paused",
        }
    }
}

/// What is known about a condition: its value, a reason in CamelCase and a message for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The condition.
    pub kind: ConditionType,
    /// `None`: unknown.
    pub value: Option<bool>,
    /// One word in CamelCase, for programs.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

impl Finding {
    fn status(&self) -> &'static str {
        match self.value {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        }
    }
}

/// The conditions after `findings`: a condition whose status stays the same keeps its transition
/// time. Conditions of types that are not among the findings stay as they are.
pub fn merge(old: &[Condition], findings: &[Finding], generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
    let mut merged: Vec<Condition> = findings
        .iter()
        .map(|finding| {
            let status = finding.status();
            let since = old
                .iter()
                .find(|c| c.type_ == finding.kind.as_str() && c.status == status)
                .map_or_else(|| Time(now), |c| c.last_transition_time.clone());
            Condition {
                type_: finding.kind.as_str().to_owned(),
                status: status.to_owned(),
                reason: finding.reason.to_owned(),
                message: finding.message.clone(),
                observed_generation: generation,
                last_transition_time: since,
            }
        })
        .collect();
    let others = old.iter().filter(|c| !merged.iter().any(|m| m.type_ == c.type_));
    let others: Vec<_> = others.cloned().collect();
    merged.extend(others);
    merged
}

/// The condition of a type, if it is there.
pub fn condition(conditions: &[Condition], kind: ConditionType) -> Option<&Condition> {
    conditions.iter().find(|c| c.type_ == kind.as_str())
}

/// Whether a condition is there and true.
pub fn is_true(conditions: &[Condition], kind: ConditionType) -> bool {
    condition(conditions, kind).is_some_and(|c| c.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(value: bool, message: &str) -> Finding {
        Finding {
            kind: ConditionType::Available,
            value: Some(value),
            reason: "Test",
            message: message.to_owned(),
        }
    }

    #[test]
    fn transition_time_moves_only_with_the_status() {
        let [t1, t2, t3] = [1, 2, 3].map(|s| Timestamp::from_second(s).unwrap());
        let first = merge(&[], &[finding(false, "a")], Some(1), t1);
        let second = merge(&first, &[finding(false, "b")], Some(2), t2);
        assert_eq!(second[0].last_transition_time, Time(t1));
        assert_eq!(
            (second[0].message.as_str(), second[0].observed_generation),
            ("b", Some(2))
        );
        let third = merge(&second, &[finding(true, "c")], Some(2), t3);
        assert_eq!(third[0].last_transition_time, Time(t3));
        assert!(is_true(&third, ConditionType::Available));
        assert!(!is_true(&third, ConditionType::Degraded));
    }

    #[test]
    fn foreign_conditions_stay() {
        let now = Timestamp::from_second(1).unwrap();
        let mut foreign = merge(&[], &[finding(true, "a")], None, now);
        foreign[0].type_ = "Foreign".to_owned();
        let merged = merge(&foreign, &[finding(true, "b")], None, now);
        assert_eq!(merged.len(), 2);
    }
}

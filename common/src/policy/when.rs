//! Times at which a rule is in force: weekly windows in a time zone and an end, as absolute intervals.

use jiff::civil::{Date, Time};
use jiff::tz::TimeZone;
use jiff::{Span as TimeSpan, Timestamp, ToSpan};

use super::posture::{Condition, TimeFacts, Truth};
use crate::filter::UnixInterval;

/// Furthest a compile looks ahead; agents get new intervals long before. Unit: seconds.
pub const MAX_HORIZON_S: i64 = 31 * 24 * 3_600;

/// Days by their word in the file, Monday first.
pub(crate) const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// A weekly window: on some days from one time to another, in a time zone.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Window {
    /// Bit 0 is Monday.
    pub(crate) days: u8,
    /// Minutes after midnight.
    pub(crate) from: u16,
    /// Minutes after midnight; at or before `from` means the next day.
    pub(crate) to: u16,
    pub(crate) zone: TimeZone,
}

/// `hh:mm`, and `24:00`. Unit: minutes after midnight.
pub(crate) fn parse_minutes(text: &str) -> Option<u16> {
    let (h, m) = text.split_once(':')?;
    if h.len() != 2 || m.len() != 2 {
        return None;
    }
    let (h, m): (u16, u16) = (h.parse().ok()?, m.parse().ok()?);
    (m < 60 && (h < 24 || (h == 24 && m == 0))).then_some(h * 60 + m)
}

/// A day by its short or long English name.
pub(crate) fn parse_day(text: &str) -> Option<u8> {
    const LONG: [&str; 7] = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"];
    let word = text.trim().to_ascii_lowercase();
    (0..7).find_map(|i| (word == DAYS[i] || word == LONG[i]).then_some(1 << i))
}

/// The intervals of `windows` that touch `[now, now + horizon)`. They are whole, not cut at `now`, so that the result
/// does not change while a window is open.
pub(crate) fn expand(windows: &[Window], now: i64, horizon_s: i64) -> Vec<UnixInterval> {
    let end = now.saturating_add(horizon_s.clamp(0, MAX_HORIZON_S));
    let mut out = Vec::new();
    for window in windows {
        let Ok(start) = Timestamp::from_second(now) else {
            continue;
        };
        // From the day before: a window may run over midnight.
        let mut date = start.to_zoned(window.zone.clone()).date();
        date = date.saturating_sub(1.day());
        while let Some(from) = instant(date, window.from, &window.zone) {
            if from >= end {
                break;
            }
            let weekday = date.weekday().to_monday_zero_offset();
            let last = if window.to <= window.from { date.saturating_add(1.day()) } else { date };
            if window.days & (1 << weekday) != 0
                && let Some(until) = instant(last, window.to, &window.zone)
                && until > now
                && until > from
            {
                out.push(UnixInterval { from, until });
            }
            let next = date.saturating_add(1.day());
            if next == date {
                break;
            }
            date = next;
        }
    }
    merge(out)
}

fn instant(date: Date, minutes: u16, zone: &TimeZone) -> Option<i64> {
    let time = Time::midnight();
    let wall = date.to_datetime(time).checked_add(TimeSpan::new().minutes(i64::from(minutes))).ok()?;
    Some(zone.to_zoned(wall).ok()?.timestamp().as_second())
}

/// What conditions over the clock see.
pub(crate) fn facts_at(at: Timestamp) -> TimeFacts {
    let at = at.to_zoned(TimeZone::UTC);
    let day = usize::try_from(at.weekday().to_monday_zero_offset()).unwrap_or(0);
    TimeFacts {
        hour: u8::try_from(at.hour()).unwrap_or(0),
        weekday: DAYS[day.min(6)],
        date: at.date().to_string(),
    }
}

/// The hours of `[now, now + horizon)` in which every condition over the clock holds.
pub(crate) fn expand_conditions(conditions: &[&Condition], now: i64, horizon_s: i64) -> Vec<UnixInterval> {
    let end = now.saturating_add(horizon_s.clamp(0, MAX_HORIZON_S));
    let mut hour = now.div_euclid(3_600) * 3_600;
    let mut out = Vec::new();
    while hour < end.max(now + 1) {
        let Ok(at) = Timestamp::from_second(hour) else {
            break;
        };
        let facts = facts_at(at);
        if conditions.iter().all(|c| c.evaluate_time(&facts) == Truth::True) {
            out.push(UnixInterval { from: hour, until: hour + 3_600 });
        }
        hour += 3_600;
    }
    merge(out)
}

/// Sorted and disjoint.
pub(crate) fn merge(mut intervals: Vec<UnixInterval>) -> Vec<UnixInterval> {
    intervals.sort_unstable();
    let mut out: Vec<UnixInterval> = Vec::with_capacity(intervals.len());
    for next in intervals {
        match out.last_mut() {
            Some(last) if next.from <= last.until => last.until = last.until.max(next.until),
            _ => out.push(next),
        }
    }
    out
}

/// What is in both; `None` is always.
pub(crate) fn both(a: Option<Vec<UnixInterval>>, b: Option<Vec<UnixInterval>>) -> Option<Vec<UnixInterval>> {
    let (Some(a), Some(b)) = (&a, &b) else {
        return a.or(b);
    };
    let mut out = Vec::new();
    for x in a {
        for y in b {
            let (from, until) = (x.from.max(y.from), x.until.min(y.until));
            if from < until {
                out.push(UnixInterval { from, until });
            }
        }
    }
    Some(merge(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> i64 {
        text.parse::<Timestamp>().expect("RFC 3339").as_second()
    }

    fn window(days: u8, from: &str, to: &str, zone: &str) -> Window {
        Window {
            days,
            from: parse_minutes(from).expect("time"),
            to: parse_minutes(to).expect("time"),
            zone: TimeZone::get(zone).expect("zone"),
        }
    }

    #[test]
    fn a_working_week_in_a_zone_with_summer_time() {
        let berlin = window(0b1_1111, "09:00", "17:00", "Europe/Berlin");
        // Friday 27 March 2026 is before the change to summer time, Monday after.
        let found = expand(&[berlin], at("2026-03-27T12:00:00Z"), 4 * 86_400);
        let want: Vec<UnixInterval> = [
            ("2026-03-27T08:00:00Z", "2026-03-27T16:00:00Z"),
            ("2026-03-30T07:00:00Z", "2026-03-30T15:00:00Z"),
            ("2026-03-31T07:00:00Z", "2026-03-31T15:00:00Z"),
        ]
        .iter()
        .map(|(a, b)| UnixInterval { from: at(a), until: at(b) })
        .collect();
        assert_eq!(found, want);
    }

    #[test]
    fn a_night_runs_over_midnight_and_stays_whole() {
        let night = window(1 << 4, "22:00", "06:00", "UTC");
        let now = at("2026-03-28T01:00:00Z");
        assert_eq!(
            expand(&[night], now, 3_600),
            vec![UnixInterval { from: at("2026-03-27T22:00:00Z"), until: at("2026-03-28T06:00:00Z") }]
        );
    }

    #[test]
    fn intersections() {
        let i = |from, until| UnixInterval { from, until };
        assert_eq!(
            both(Some(vec![i(0, 10), i(20, 30)]), Some(vec![i(5, 25)])),
            Some(vec![i(5, 10), i(20, 25)])
        );
        assert_eq!(both(None, Some(vec![i(1, 2)])), Some(vec![i(1, 2)]));
        assert_eq!(both(None, None), None);
        assert_eq!(parse_minutes("24:00"), Some(1_440));
        for bad in ["24:01", "9:00", "12:60", "x", ""] {
            assert_eq!(parse_minutes(bad), None);
        }
    }

    #[test]
    fn hours_of_the_clock() {
        let day = Condition::parse("time:weekday NOT IN ['sat','sun']").expect("valid");
        let hour = Condition::parse("time:hour < 2").expect("valid");
        let found = expand_conditions(&[&day, &hour], at("2026-03-27T00:30:00Z"), 4 * 86_400);
        let hours: Vec<i64> = found.iter().map(|w| (w.until - w.from) / 3_600).collect();
        assert_eq!(hours, vec![2, 2, 1]);
    }

    #[test]
    fn the_horizon_is_bounded() {
        let always = window(0x7f, "00:00", "24:00", "UTC");
        let found = expand(&[always], 0, i64::MAX);
        assert_eq!(found.len(), 1);
        assert!(found[0].until <= MAX_HORIZON_S + 86_400);
    }
}

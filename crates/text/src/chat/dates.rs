//! `strftime` for chat templates, in UTC.

use std::time::{SystemTime, UNIX_EPOCH};

const SECONDS_PER_DAY: i64 = 86_400;
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// The system's clock in seconds since 1970.
pub(super) fn unix_time_now_s() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|passed| i64::try_from(passed.as_secs()).ok())
        .unwrap_or(0)
}

/// Days since 1970 as year, month 1–12 and day 1–31 of the Gregorian calendar. Years are counted
/// from March, so that the leap day comes last, in cycles of 400 years (146,097 days).
fn civil_date(days: i64) -> (i64, usize, i64) {
    let days = days + 719_468; // from 1 March of year 0
    let cycle = days.div_euclid(146_097);
    let day_of_cycle = days.rem_euclid(146_097);
    let year_of_cycle = (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524
        - day_of_cycle / 146_096)
        / 365;
    let day_of_year =
        day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = cycle * 400 + year_of_cycle + i64::from(month <= 2);
    (year, month as usize, day)
}

/// Days from 1970 to 1 January of a year.
fn days_to_year(year: i64) -> i64 {
    let before = year - 1;
    365 * (year - 1970) + before.div_euclid(4) - before.div_euclid(100) + before.div_euclid(400)
        - 477
}

/// Formats a time as C's and Python's `strftime` do, in the C locale; `%-d` and its like leave out
/// leading zeros.
pub(super) fn strftime(format: &str, unix_time_s: i64) -> Result<String, String> {
    let days = unix_time_s.div_euclid(SECONDS_PER_DAY);
    let second_of_day = unix_time_s.rem_euclid(SECONDS_PER_DAY);
    let (year, month, day) = civil_date(days);
    let (hour, minute) = (second_of_day / 3_600, second_of_day / 60 % 60);
    let month_name = MONTHS[month - 1];
    let weekday = WEEKDAYS[(days + 4).rem_euclid(7) as usize];
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next();
        let padded = directive != Some('-');
        if !padded {
            directive = characters.next();
        }
        let number = |value: i64, width: usize| {
            let width = if padded { width } else { 0 };
            format!("{value:0width$}")
        };
        let text = match directive {
            Some('d') => number(day, 2),
            Some('m') => number(month as i64, 2),
            Some('Y') => number(year, 4),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second_of_day % 60, 2),
            Some('j') => number(days - days_to_year(year) + 1, 3),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            Some('F') => strftime("%Y-%m-%d", unix_time_s)?,
            Some('T') => strftime("%H:%M:%S", unix_time_s)?,
            other => {
                let other = other.map_or_else(String::new, String::from);
                return Err(format!("strftime_now does not know the directive %{other}"));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected values: Python's datetime.fromtimestamp(t, timezone.utc).strftime(...).
    #[test]
    fn known_dates() {
        let format = "%A %a %d %-d %B %b %Y %y %m %H:%M:%S %I%p %j %Z%z %%";
        assert_eq!(
            strftime(format, 951_827_696).as_deref(),
            Ok("Tuesday Tue 29 29 February Feb 2000 00 02 12:34:56 12PM 060 UTC+0000 %")
        );
        assert_eq!(
            strftime(format, 0).as_deref(),
            Ok("Thursday Thu 01 1 January Jan 1970 70 01 00:00:00 12AM 001 UTC+0000 %")
        );
        assert_eq!(
            strftime("%F %T %j", 1_735_689_599).as_deref(),
            Ok("2024-12-31 23:59:59 366")
        );
        assert_eq!(strftime("%F", -1).as_deref(), Ok("1969-12-31"));
    }

    #[test]
    fn unknown_directive_is_an_error() {
        assert!(strftime("%Q", 0).is_err());
        assert!(strftime("%", 0).is_err());
    }
}

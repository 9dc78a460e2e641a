//! The form of every figure: `name | figure | limit | ratio | goal | met`, so that the tables of all benches are one.

/// What a figure, or its ratio to the limit, is to be.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

impl Goal {
    fn is_met(self, reached: f64) -> bool {
        match self {
            Self::AtMost(most) => reached <= most,
            Self::AtLeast(least) => reached >= least,
        }
    }

    fn text(self, unit: &str) -> String {
        match self {
            Self::AtMost(most) => format!("<= {} {unit}", number(most)),
            Self::AtLeast(least) => format!(">= {} {unit}", number(least)),
        }
    }
}

/// A line of the table.
pub(crate) struct Line<'a> {
    name: &'a str,
    figure: f64,
    unit: &'a str,
    limit: Option<f64>,
    ratio: Option<f64>,
    goal: Option<(Goal, f64, String)>,
}

impl<'a> Line<'a> {
    /// A figure without limit or goal.
    pub(crate) fn new(name: &'a str, figure: f64, unit: &'a str) -> Self {
        Self { name, figure, unit, limit: None, ratio: None, goal: None }
    }

    /// Beside a limit of the same unit. The ratio is the median of the rounds' own, and so not always the quotient.
    pub(crate) fn beside(mut self, limit: f64, ratio: f64) -> Self {
        (self.limit, self.ratio) = (Some(limit), Some(ratio));
        self
    }

    /// What the figure is to be.
    pub(crate) fn goal(mut self, goal: Goal) -> Self {
        self.goal = Some((goal, self.figure, goal.text(self.unit)));
        self
    }

    /// What the ratio is to be; nothing where there is no limit.
    pub(crate) fn ratio_goal(mut self, goal: Goal) -> Self {
        self.goal = self.ratio.map(|ratio| (goal, ratio, goal.text("x")));
        self
    }

    /// Writes the line.
    pub(crate) fn print(self) {
        let with_unit = |figure: f64| format!("{} {}", number(figure), self.unit);
        let none = || "-".to_owned();
        let (goal, met) = match &self.goal {
            Some((goal, reached, text)) => (text.clone(), if goal.is_met(*reached) { "yes" } else { "NO" }),
            None => (none(), "-"),
        };
        row(&[
            self.name,
            &with_unit(self.figure),
            &self.limit.map_or_else(none, with_unit),
            &self.ratio.map_or_else(none, |ratio| format!("{ratio:.2}")),
            &goal,
            met,
        ]);
    }
}

/// What stands above the lines.
pub(crate) fn head() {
    row(&["name", "figure", "limit", "ratio", "goal", "met"]);
}

fn row([name, figure, limit, ratio, goal, met]: &[&str; 6]) {
    println!("{name:<102} | {figure:>16} | {limit:>16} | {ratio:>6} | {goal:>16} | {met}");
}

/// Three digits or more.
fn number(figure: f64) -> String {
    match figure.abs() {
        0.0 => "0".to_owned(),
        100.0.. => format!("{figure:.0}"),
        10.0.. => format!("{figure:.1}"),
        1.0.. => format!("{figure:.2}"),
        _ => format!("{figure:.3}"),
    }
}

//! Glob rules as one tree of components: a lookup goes down along the components of a name, whatever the number of rules.
//!
//! A node has a child for each literal component and one for `*`. Where both fit, both are tried, which is what takes
//! longer than the name is long: but no node twice, none from where the name's end can't be reached, and, as rules are in
//! order, none behind which all rules come later than the one found. `glob_disable_ordering` takes the first one that is
//! found when literal components go before `*`, as statsd_exporter does.

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use super::Metric;

/// No rule.
const NONE: u32 = u32::MAX;

/// The tree of all glob rules of a file.
#[derive(Debug)]
pub(super) struct Globs {
    nodes: Vec<Node>,
    ordered: bool,
}

#[derive(Debug)]
struct Node {
    literals: HashMap<String, u32, RandomState>,
    star: Option<u32>,
    /// The first rule that ends here, for each metric type.
    rule: [u32; 3],
    /// The first rule that ends here or below.
    first: [u32; 3],
    /// Bit n: a rule ends n components below; the last bit stands for all that are further.
    below: u64,
}

impl Node {
    fn new() -> Self {
        let literals = HashMap::with_hasher(RandomState::default());
        Self { literals, star: None, rule: [NONE; 3], first: [NONE; 3], below: 0 }
    }
}

/// The bit of [`Node::below`] for a number of components.
fn bit(components: usize) -> u64 {
    1 << components.min(63)
}

/// A node to be looked at, and how the search got there.
struct Step {
    node: u32,
    /// Components of the name so far.
    depth: usize,
    /// Captures before the last component.
    captures: usize,
    by_star: bool,
}

impl Globs {
    /// A tree without rules. `ordered`: the first rule of the file wins.
    pub(super) fn new(ordered: bool) -> Self {
        Self { nodes: vec![Node::new()], ordered }
    }

    /// Adds a rule, which comes later than all that are there. Says how many captures it has.
    pub(super) fn add(&mut self, pattern: &str, metric: Option<Metric>, rule: u32) -> usize {
        let len = pattern.split('.').count();
        let (mut at, mut captures) = (0, 0);
        for (depth, component) in pattern.split('.').enumerate() {
            self.pass(at, len - depth, metric, rule);
            captures += usize::from(component == "*");
            at = self.child(at, component);
        }
        self.pass(at, 0, metric, rule);
        for place in places(metric) {
            let ends = &mut self.nodes[at as usize].rule[place];
            *ends = (*ends).min(rule);
        }
        captures
    }

    /// Notes that a rule goes through a node and ends so many components below.
    fn pass(&mut self, at: u32, below: usize, metric: Option<Metric>, rule: u32) {
        let node = &mut self.nodes[at as usize];
        node.below |= bit(below);
        for place in places(metric) {
            node.first[place] = node.first[place].min(rule);
        }
    }

    /// The child for a component, made if there is none.
    fn child(&mut self, at: u32, component: &str) -> u32 {
        let next = self.nodes.len() as u32;
        let node = &mut self.nodes[at as usize];
        let child = match component {
            "*" => *node.star.get_or_insert(next),
            _ => *node.literals.entry_ref(component).or_insert(next),
        };
        if child == next {
            self.nodes.push(Node::new());
        }
        child
    }

    /// The rule for a name, and what its stars stand for.
    pub(super) fn find<'n>(&self, metric: Metric, name: &'n str) -> Option<(u32, Vec<&'n str>)> {
        self.search(metric, name).0
    }

    /// The same, with the number of nodes that were looked at.
    fn search<'n>(&self, metric: Metric, name: &'n str) -> (Option<(u32, Vec<&'n str>)>, usize) {
        let components: Vec<&str> = name.split('.').collect();
        let place = metric as usize;
        let (mut best, mut best_captures) = (NONE, Vec::new());
        let mut captures: Vec<&str> = Vec::new();
        let mut steps = vec![Step { node: 0, depth: 0, captures: 0, by_star: false }];
        let mut looked_at = 0;
        while let Some(step) = steps.pop() {
            let node = &self.nodes[step.node as usize];
            if node.first[place] >= best {
                continue;
            }
            looked_at += 1;
            captures.truncate(step.captures);
            if step.by_star {
                captures.push(components[step.depth - 1]);
            }
            let Some(component) = components.get(step.depth) else {
                if node.rule[place] < best {
                    (best, best_captures) = (node.rule[place], captures.clone());
                    if !self.ordered {
                        break;
                    }
                }
                continue;
            };
            let left = bit(components.len() - step.depth - 1);
            let mut go = |child: Option<u32>, by_star| {
                if let Some(child) = child.filter(|child| self.nodes[*child as usize].below & left != 0) {
                    steps.push(Step { node: child, depth: step.depth + 1, captures: captures.len(), by_star });
                }
            };
            // What is pushed last is tried first.
            go(node.star, true);
            go(node.literals.get(*component).copied(), false);
        }
        ((best != NONE).then_some((best, best_captures)), looked_at)
    }
}

/// The metric types that a rule is for.
fn places(metric: Option<Metric>) -> impl Iterator<Item = usize> {
    Metric::ALL.into_iter().filter(move |one| metric.is_none_or(|metric| metric == *one)).map(|metric| metric as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn globs(ordered: bool, patterns: &[&str]) -> Globs {
        let mut globs = Globs::new(ordered);
        for (rule, pattern) in patterns.iter().enumerate() {
            globs.add(pattern, None, rule as u32);
        }
        globs
    }

    fn find<'n>(globs: &Globs, name: &'n str) -> Option<(u32, Vec<&'n str>)> {
        globs.find(Metric::Counter, name)
    }

    #[test]
    fn a_star_is_one_component_and_may_be_empty() {
        let globs = globs(true, &["a.*", "*.*.c"]);
        assert_eq!(find(&globs, "a.b"), Some((0, vec!["b"])));
        assert_eq!(find(&globs, "a."), Some((0, vec![""])));
        assert_eq!(find(&globs, "a.b.c"), Some((1, vec!["a", "b"])));
        for other in ["a", "", "a.b.d", "b.a", "a.b.c.d"] {
            assert_eq!(find(&globs, other), None, "{other}");
        }
    }

    #[test]
    fn with_ordering_the_first_rule_of_the_file_wins() {
        let patterns = ["a.*.*", "a.b.*", "*.b.c", "a.b.c"];
        assert_eq!(find(&globs(true, &patterns), "a.b.c"), Some((0, vec!["b", "c"])));
        assert_eq!(find(&globs(false, &patterns), "a.b.c"), Some((3, vec![])));
        assert_eq!(find(&globs(true, &["a.b", "a.*", "a.b"]), "a.b"), Some((0, vec![])));
    }

    #[test]
    fn a_way_that_ends_nowhere_is_left_again() {
        for ordered in [true, false] {
            let globs = globs(ordered, &["a.*.c", "a.b.d", "a.x.c", "a.b"]);
            assert_eq!(find(&globs, "a.b.c"), Some((0, vec!["b"])), "{ordered}");
            assert_eq!(find(&globs, "a.b"), Some((3, vec![])), "a rule that is the beginning of another");
        }
    }

    #[test]
    fn a_failed_try_leaves_no_captures() {
        let globs = globs(true, &["*.dummy.*", "full.name.*"]);
        assert_eq!(find(&globs, "full.name.x"), Some((1, vec!["x"])));
        assert_eq!(find(&globs, "full.dummy.x"), Some((0, vec!["full", "x"])));
    }

    #[test]
    fn rules_are_for_their_metric_types() {
        let mut globs = Globs::new(true);
        globs.add("m.*", Some(Metric::Counter), 0);
        globs.add("m.*", None, 1);
        let found = Metric::ALL.map(|metric| globs.find(metric, "m.a").map(|(rule, _)| rule));
        assert_eq!(found, [Some(0), Some(1), Some(1)]);
    }

    #[test]
    fn ten_thousand_rules_cost_a_lookup_no_more_than_ten() {
        let steps = |rules: usize, name: &str| {
            let mut globs = Globs::new(true);
            for rule in 0..rules {
                globs.add(&format!("app.service{rule}.*.requests.*"), None, rule as u32);
            }
            globs.add("*.*.*.requests.*", None, rules as u32);
            let (found, steps) = globs.search(Metric::Counter, name);
            assert!(found.is_some());
            steps
        };
        for name in ["app.service7.eu.requests.ok", "app.unknown.eu.requests.ok", "other.x.eu.requests.ok"] {
            assert_eq!(steps(10_000, name), steps(10, name), "{name}");
            assert!(steps(10_000, name) <= 2 * name.split('.').count() + 2, "{name}");
        }
    }

    /// The rules one after the other.
    fn plain<'n>(patterns: &[String], name: &'n str) -> Option<(u32, Vec<&'n str>)> {
        patterns.iter().enumerate().find_map(|(rule, pattern)| {
            let (pattern, name): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), name.split('.').collect());
            let pairs = || pattern.iter().zip(&name);
            let fits = pattern.len() == name.len() && pairs().all(|(glob, part)| *glob == "*" || glob == part);
            fits.then(|| (rule as u32, pairs().filter(|(glob, _)| **glob == "*").map(|(_, part)| *part).collect()))
        })
    }

    proptest! {
        #[test]
        fn the_tree_finds_what_a_walk_over_all_rules_finds(
            patterns in prop::collection::vec("[ab*](\\.[ab*]){0,4}", 1..12),
            name in "[abc](\\.[abc]){0,4}",
        ) {
            let names: Vec<&str> = patterns.iter().map(String::as_str).collect();
            prop_assert_eq!(find(&globs(true, &names), &name), plain(&patterns, &name));
            let any = find(&globs(false, &names), &name);
            prop_assert_eq!(any.is_some(), plain(&patterns, &name).is_some());
        }
    }
}

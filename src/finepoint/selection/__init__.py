"""Which entries? Target weights, rules, statistics, selection."""

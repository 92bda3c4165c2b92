"""How tokens attend: order and tiles, windows, plans, schedules, cost, and the one place that chooses a kernel. Knows no model."""

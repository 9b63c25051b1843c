"""Several processes: the world they form, and the plan of what they hold and cost."""

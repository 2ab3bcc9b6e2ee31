"""The embedded town: a world of made-up facts, all that is said of it, and an exact scorer."""

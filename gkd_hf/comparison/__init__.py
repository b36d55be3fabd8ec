"""Comparing methods: variants × seeds of one recipe, tuned on the source alone, in one table."""

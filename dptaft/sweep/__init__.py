"""Recipes: many runs over budgets, methods and seeds, at little more than the price of one."""

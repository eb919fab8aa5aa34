"""``headrace bench pqcache``: what decode steps over a sketch of the keys cost, and what they lose."""

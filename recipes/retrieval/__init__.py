"""The recipe of the small model that ``headrace bench pqcache`` asks to find things in its context."""

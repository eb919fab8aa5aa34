"""Where K and V lie: slots, what a slot holds, and which prefixes are known."""

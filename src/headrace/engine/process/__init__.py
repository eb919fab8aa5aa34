"""The engine in a process of its own: what it is asked, what it answers, and how it is brought back."""

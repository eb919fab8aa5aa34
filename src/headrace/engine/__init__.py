"""The step loop: sequences, slots, policies, sampling and the process that runs them."""

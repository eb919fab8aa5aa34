"""What requests come and when: made up, or recorded."""

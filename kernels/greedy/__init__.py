"""Orders in which greedy methods take visual tokens: by diversity, or by diversity and importance."""

"""Which precision each layer gets: sensitivities, and the assignment under a budget."""

"""Pure tensor functions: the transitions, schedules, advantages, losses and entropies of the method."""

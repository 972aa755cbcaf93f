"""Where the budget goes: how many rollouts a prompt gets, and at which denoising steps it explores."""

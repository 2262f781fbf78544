"""The torch.optim.Optimizer shell over the rules, and what it checks, plans and loads."""

"""Reinforcement learning: PPO on small games, under any strategy. The policy that acts is the one that is deployed."""

"""Replay of recorded replies: what a drafter would bring, before anything is deployed."""

"""The demo: a real chat model answers, plain and with freedraft, and what that brought is measured."""

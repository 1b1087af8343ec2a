"""Private: the engine behind `LARS.step()`. `docs/architecture.md` walks through it."""

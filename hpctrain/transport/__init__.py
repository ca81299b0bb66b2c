"""How ranks talk: communicators, dense reducers, launch and abort guards, the stall watchdog."""

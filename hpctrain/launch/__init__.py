"""Starting hpctrain on a cluster: batch scripts and containers. Pure text where it can be."""

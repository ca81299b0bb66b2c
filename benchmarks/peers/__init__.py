"""What hpctrain's exchanges are measured against: scripts as their users write them."""

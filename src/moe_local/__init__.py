"""moe-local: large Mixture-of-Experts models on one ordinary GPU."""

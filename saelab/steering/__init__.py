"""Steering measured: baselines, matched doses, and judges that read text only."""

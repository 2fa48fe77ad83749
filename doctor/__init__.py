"""What works on this machine, proved in child processes, and the quarantine of packages that would end the host."""

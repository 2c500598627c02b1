"""What every room rests on: files, leases, signals, progress, errors, paths, identity."""

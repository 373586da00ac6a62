"""Jobs on disks: each module holds the policy of one job type, and is found by `jobs.types`."""

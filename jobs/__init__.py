"""Jobs: long-running work that can be watched, paused, cancelled and completed.

This package knows nothing of disks. `jobs.job.Job` is what a job type derives from, `jobs.manager.JobManager`
holds the jobs of a server, `jobs.transaction.Transaction` decides how they end, `jobs.status` has the tables
of statuses and verbs, `jobs.types` finds job types, and `jobs.testing` helps to test them. `jobs.block` has
the jobs on disks.
"""

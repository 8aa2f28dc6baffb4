"""What a person looks at: pages and figures of runs and studies."""

"""The report: from the manifests on disk to one HTML and one Markdown file. No stage knows that it exists."""

"""The report of a comparison or an experiment: report.json as sentences, tables, figures and pages."""

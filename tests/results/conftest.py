"""The run folders that tests of tables read, as tests of pages do."""

from tests.report.conftest import study, write_findings, write_point, written_study

__all__ = ["study", "write_findings", "write_point", "written_study"]

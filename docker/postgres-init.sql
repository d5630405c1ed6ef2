-- MLflow migrates its own database with Alembic; Tandem's tables live apart from it, in the database `tandem`.
CREATE DATABASE mlflow;

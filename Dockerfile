# The programs with the tested versions. torch's wheels bring their CUDA libraries; the host needs a driver and the NVIDIA
# container toolkit. docs/installation.md has the commands. Not built by the tests.
FROM python:3.11-slim
WORKDIR /reg
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt
COPY . .
CMD ["python", "train.py", "--help"]

#!/usr/bin/env bash
# Creates a TPU VM, installs the project there and starts train.py; see --help.
set -euo pipefail

usage() {
  cat <<'END'
scripts/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE --version=RUNTIME
                  --gin_file=FILE --workdir=gs://… [more flags]
scripts/tpu_vm.sh --delete --name=NAME --zone=ZONE

Creates a TPU VM, installs the project on it from requirements-tpu.lock, and starts train.py in
the background, so that it goes on after the connection ends. It never ran against Google Cloud:
read what --dry_run prints first. A TPU VM costs money until it is deleted.

  --name          of the TPU VM
  --zone          such as us-central2-b
  --project       of Google Cloud; gcloud's own default if left out
  --type          accelerator type, such as v4-8
  --version       runtime, such as tpu-vm-tf-2.20.0-pjrt; what there is, says
                  gcloud compute tpus tpu-vm versions list --zone=ZONE
  --spot          cheaper, and may be taken away at any time
  --git           address to clone the project from; if left out, this checkout's last commit
                  is copied
  --gin_file      config, by its path in the checkout, or gs://…; repeatable; also --config
  --gin_param     binding, such as 'Experiment.seed = 1'; repeatable
  --workdir       folder of the run, gs://…: the disk of the VM goes when the VM goes
  --delete        deletes the VM, and does nothing else
  --dry_run       prints every command and runs none
  --help          prints this

A slice of several hosts needs a runtime whose name has '-pod' in it. All hosts install; train.py
then runs on the first one, with --tpu=NAME, and drives the others: so TensorFlow wants it. On one
host it runs with --tpu=local.

To go on with a run that was stopped or taken away: --delete, and the same command again.
Exit codes: 0 done; 2 a wrong or missing flag; else that of the command that failed.
END
}

fail() {
  printf 'tpu_vm.sh: %s; see --help\n' "$1" >&2
  exit 2
}

# Prints a command as a shell reads it.
print_command() {
  local word line="" escaped="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/$escaped}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

run() {
  print_command "$@"
  "$dry_run" || "$@"
}

name="" zone="" project="" type="" version="" git="" workdir=""
spot=false delete=false dry_run=false
gin=() # flags of train.py
files=()

read_flags() {
  local flag value
  while (($#)); do
    flag=${1%%=*}
    case $flag in
      --help | --spot | --delete | --dry_run)
        [[ $1 == "$flag" ]] || fail "$flag takes no value"
        ;;
      --name | --zone | --project | --type | --version | --git | --workdir | --config | \
        --gin_file | --gin_param)
        if [[ $1 == *=* ]]; then
          value=${1#*=}
        else
          value=${2:-}
          [[ $value != --* ]] || value=""
          shift
        fi
        [[ -n $value ]] || fail "$flag needs a value"
        ;;
      *) fail "there is no flag $1" ;;
    esac
    case $flag in
      --help) usage && exit ;;
      --gin_param) gin+=("--gin_param=$value") ;;
      --gin_file | --config) gin+=("--gin_file=$value") files+=("$value") ;;
      --spot | --delete | --dry_run) printf -v "${flag#--}" true ;;
      *) printf -v "${flag#--}" %s "$value" ;;
    esac
    shift
  done
}

check_flags() {
  local flag
  local needed=(name zone)
  "$delete" || needed+=(type version workdir)
  for flag in "${needed[@]}"; do
    [[ -n ${!flag} ]] || fail "--$flag is missing"
  done
  [[ $name =~ ^[a-z][-a-z0-9]*$ ]] ||
    fail "--name takes small letters, digits and hyphens, a letter first, not '$name'"
  if "$delete"; then
    [[ $spot$type$version$git$workdir${gin[*]-} == false ]] ||
      fail "--delete takes only --name, --zone, --project and --dry_run beside it"
    return
  fi
  ((${#files[@]})) || fail "--gin_file is missing"
  [[ $workdir == gs://?* ]] || fail "--workdir takes gs://…, not '$workdir'"
  [[ -n $git ]] || check_checkout
}

check_checkout() {
  local file
  [[ $(git -C "$root" rev-parse --is-shallow-repository 2>/dev/null) == false ]] ||
    fail "$root is no whole git checkout that could be copied: give an address with --git"
  for file in "${files[@]}"; do
    [[ $file == *://* ]] || git -C "$root" cat-file -e "HEAD:$file" 2>/dev/null ||
      fail "--gin_file=$file is not in this checkout's last commit"
  done
  git -C "$root" diff --quiet HEAD -- ||
    printf 'tpu_vm.sh: what is not committed stays here\n' >&2
}

# gcloud's part of a command: what to do, and with which TPU VM.
tpu_vm() {
  run gcloud compute tpus tpu-vm "$@" "${where[@]}"
}

create() {
  local flags=("--accelerator-type=$type" "--version=$version")
  "$spot" && flags+=(--spot)
  tpu_vm create "$name" "${flags[@]}"
}

# The Python of TPU VMs may be older than 3.11, so uv fetches one. The rest is what make does.
install() {
  local from=$git bundle="${TMPDIR:-/tmp}/$name.bundle" pip steps all
  if [[ -z $git ]]; then
    from=condconv.bundle
    run git -C "$root" bundle create "$bundle" HEAD
    tpu_vm scp "$bundle" "$name:$from" --worker=all
    run rm -f "$bundle"
  fi
  pip=".venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps"
  steps=(
    "sudo apt-get -q -o DPkg::Lock::Timeout=300 update"
    "sudo apt-get -q -o DPkg::Lock::Timeout=300 install -y git python3-venv"
    "$(print_command git clone "$from" condconv)"
    "python3 -m venv uv"
    "uv/bin/pip install --quiet uv"
    "cd condconv"
    "../uv/bin/uv venv --quiet --seed --python=3.12 .venv"
    "$pip --require-hashes -r requirements-tpu.lock"
    "$pip --no-build-isolation --editable ."
  )
  all=$(printf ' && %s' "${steps[@]}")
  tpu_vm ssh "$name" --worker=all --command="${all# && }"
}

# What is named here is from Google's own tests of TensorFlow on TPU VMs
# (GoogleCloudPlatform/ml-auto-solutions, dags/solutions_team/configs/tensorflow).
launch() {
  local tpu=local variables=()
  case $version in
    *-pod*) tpu=$name variables=(TPU_LOAD_LIBRARY=0) ;;
    *-pjrt*)
      variables=(
        NEXT_PLUGGABLE_DEVICE_USE_C_API=true
        TF_PLUGGABLE_DEVICE_LIBRARY_PATH=/lib/libtpu.so
      )
      ;;
  esac
  local train=(
    env ${variables[@]+"${variables[@]}"} nohup .venv/bin/python train.py
    "--tpu=$tpu" "${gin[@]}" "--workdir=$workdir"
  )
  # Its three streams leave the connection, or ssh would wait for it to end.
  tpu_vm ssh "$name" --worker=0 --command="cd condconv && { \
$(print_command "${train[@]}") >train.log 2>&1 </dev/null & }"
}

# After a failure: the VM may be there.
warn_of_costs() {
  local status=$?
  if ((status)); then
    printf 'tpu_vm.sh: stopped. %s may be there, and costs money until you delete it:\n' "$name" >&2
    print_command scripts/tpu_vm.sh --delete "--name=$name" "${where[@]}" >&2
  fi
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read_flags "$@"
check_flags
"$dry_run" || command -v gcloud >/dev/null ||
  fail "gcloud is not installed: cloud.google.com/sdk/docs/install"
where=("--zone=$zone" ${project:+"--project=$project"})
if "$delete"; then
  tpu_vm delete "$name" --quiet
  exit
fi
trap warn_of_costs EXIT
create
install
launch
{
  echo "tpu_vm.sh: to look on, and to delete it in the end:"
  print_command gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 \
    --command='tail -f condconv/train.log'
  print_command scripts/tpu_vm.sh --delete "--name=$name" "${where[@]}"
} >&2

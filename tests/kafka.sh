#!/usr/bin/env bash
# The tests of tests/it/kafka.rs against a real Kafka, which this starts on loopback addresses and ends again: one node in
# KRaft mode, of the artefacts that Maven fetches. They are kept in ${XDG_CACHE_HOME:-~/.cache}/tallyd-kafka.
# `kafka.sh NAME` runs those whose names have that in them. Says what is missing and ends well where there is no Java 17, no mvn or no way to the artefacts.
set -euo pipefail
cd "$(dirname "$0")/.."

version=${KAFKA_VERSION:-4.1.0}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tallyd-kafka/$version

skip() {
  echo "kafka.sh: skipped: $*"
  exit 0
}

command -v java >/dev/null || skip "no java; install a JRE of version 17 or later"
java_version=$(java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p')
[ "${java_version:-0}" -ge 17 ] || skip "java is of version ${java_version:-?}; Kafka 4 needs 17"

work=$(mktemp -d)
broker=
finish() {
  if [ -n "$broker" ]; then
    # A test may have stopped it in its tracks.
    kill -CONT "$broker" 2>/dev/null || true
    kill -KILL "$broker" 2>/dev/null || true
    wait "$broker" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap finish EXIT

fetch() {
  command -v mvn >/dev/null || skip "no mvn to fetch Kafka with"
  cat >"$work/pom.xml" <<POM
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>tallyd</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>$version</version></dependency>
  </dependencies>
</project>
POM
  echo "== fetching Kafka $version"
  mvn -q -B -f "$work/pom.xml" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$work/jars" \
    >"$work/mvn.log" 2>&1 || { tail -5 "$work/mvn.log"; skip "Kafka $version could not be fetched"; }
  mkdir -p "$(dirname "$cache")"
  mv "$work/jars" "$cache"
}
[ -d "$cache" ] || fetch

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
port=$(free_port)
controller=$(free_port)
sasl=$(free_port)
cat >"$work/server.properties" <<CONFIG
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:$controller
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:$port,SASL_PLAINTEXT://127.0.0.1:$sasl,CONTROLLER://127.0.0.1:$controller
advertised.listeners=PLAINTEXT://127.0.0.1:$port,SASL_PLAINTEXT://127.0.0.1:$sasl
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_plaintext.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_tallyd="a password";
log.dirs=$work/data
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
CONFIG
java_run() { java -Xmx512m -cp "$cache/*" "$@"; }
java_run kafka.tools.StorageTool format --standalone --cluster-id "$(java_run kafka.tools.StorageTool random-uuid 2>/dev/null)" \
  --config "$work/server.properties" >"$work/format.log" 2>&1 || { cat "$work/format.log"; exit 1; }
java -Xmx512m -cp "$cache/*" kafka.Kafka "$work/server.properties" >"$work/broker.log" 2>&1 &
broker=$!
for _ in $(seq 120); do
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then break; fi
  kill -0 "$broker" 2>/dev/null || { tail -20 "$work/broker.log"; exit 1; }
  sleep 0.5
done
echo "== Kafka $version at 127.0.0.1:$port, process $broker"
# One after the other: some of them stop the broker for a while.
TALLYD_TEST_KAFKA=127.0.0.1:$port TALLYD_TEST_KAFKA_SASL=127.0.0.1:$sasl TALLYD_TEST_KAFKA_PID=$broker \
  cargo test --locked --features kafka --test it "${1:-kafka::}" -- --test-threads=1

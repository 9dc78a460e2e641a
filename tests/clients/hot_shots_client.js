// Everything that the client `hot-shots` of npm sends: hot_shots_client.js TRANSPORT ADDRESS SIGN, of udp, tcp, uds (datagrams)
// and stream (a stream that the caller has made, here of a unix socket); SIGN is the agent's `protocol.gauge_sign`.
//
// It says what the agent should have then, as expected.py does for the scripts in Python. Which methods there are is asked of
// the client's prototype, so that a new one fails the test until it is called here or left out with a reason.

'use strict';

const assert = require('assert');
const net = require('net');
const StatsD = require('hot-shots');

// What is sampled is always sent.
Math.random = () => 0;
// What is timed takes a quarter of a second.
let clock = 0n;
process.hrtime.bigint = () => (clock += 250000000n);

const LEFT_OUT = {
  _close: 'what close ends with',
  _send: 'what all that is sent goes through',
  enqueue: 'the same, into the buffer',
  flushQueue: 'the same, out of the buffer',
  getDatadogExtensionFields: 'it says what is added to a line',
  onBufferFlushInterval: 'what a timer calls',
  send: 'what the methods that are typed go through',
  sendAll: 'the same',
  sendMessage: 'the same',
  sendStat: 'the same',
};

const want = { metrics: [], events: [], checks: [], unplaced: 0 };
const called = new Set();
const [transport, address, sign] = process.argv.slice(2);

/// A client whose methods are noted when this script calls them; what they call themselves is not.
function watched(client) {
  return new Proxy(client, {
    get(target, name) {
      const found = target[name];
      if (typeof found !== 'function') {
        return found;
      }
      return (...given) => {
        called.add(name);
        return found.apply(target, given);
      };
    },
  });
}

function client(options) {
  const to = {};
  if (transport === 'uds') {
    to.path = address;
  } else if (transport === 'stream') {
    to.stream = net.connect(address);
  } else {
    const colon = address.lastIndexOf(':');
    to.host = address.slice(0, colon).replace(/[[\]]/g, '');
    to.port = Number(address.slice(colon + 1));
  }
  const failed = error => {
    console.error(error);
    process.exit(1);
  };
  // What is taken for a client of Datadog's agent speaks of itself by default.
  const defaults = { protocol: transport, errorHandler: failed, includeDatadogTelemetry: false };
  return watched(new StatsD({ ...defaults, ...to, ...options }));
}

/// Waits until a client's last line is with the kernel.
function closed(c) {
  return new Promise((done, failed) => c.close(error => (error ? failed(error) : done())));
}

/// Tags as JSON has them: a bare one is an empty text.
function parsed(tags) {
  return Object.fromEntries(tags.map(tag => [tag.split(':', 1)[0], tag.split(':').slice(1).join(':')]));
}

function metric(type, name, tags, fields) {
  want.metrics.push({ type, name, tags: parsed(tags), fields });
}

function counter(name, increments, decrements = 0, tags = []) {
  metric('COUNTER', name, tags, { value: increments - decrements, increments, decrements });
}

function gauge(name, value, tags = []) {
  metric('GAUGE', name, tags, { value });
}

/// The rate weighs the count and not the sum, as with Etsy's server.
function observed(type, name, values, rate = 1, tags = []) {
  const sum = values.reduce((a, b) => a + b);
  const [min, max, value] = [Math.min(...values), Math.max(...values), values.at(-1)];
  metric(type, name, tags, { count: values.length / rate, sum, mean: sum / values.length, min, max, value });
}

function event(title, text, fields = {}) {
  want.events.push({ title, text, priority: 'normal', alert_type: 'info', ...fields });
}

function check(name, status, fields = {}) {
  want.checks.push({ name, status, ...fields });
}

const OBSERVED = [['TIMER', 'timing'], ['HISTOGRAM', 'histogram'], ['DISTRIBUTION', 'distribution']];

/// Each type, with tags in either form and without. Where the client adds up, a fall may not show.
function eachType(c, before, { constant = [], full = name => name, aggregated = false } = {}) {
  const array = ['host:web1', 'flag', 'url:http://a.example/b?c=d'];
  const object = { host: 'web2', code: 200 };
  for (const [suffix, tags, own] of [['', [], []], ['.array', [array], array], ['.object', [object], ['host:web2', 'code:200']]]) {
    const all = [...constant, ...own];
    const name = type => `${before}${type}${suffix}`;
    c.increment(name('increment'), ...tags);
    c.increment(name('increment'), 2.5, ...tags);
    c.increment([name('increment'), name('increment.other')], 4, ...tags);
    counter(full(name('increment')), 7.5, 0, all);
    counter(full(name('increment.other')), 4, 0, all);
    c.decrement(name('decrement'), ...tags);
    c.decrement(name('decrement'), 4, ...tags);
    counter(full(name('decrement')), 0, 5, all);
    c.increment(name('both'), 7, ...tags);
    c.decrement(name('both'), 2, ...tags);
    if (aggregated) {
      metric('COUNTER', full(name('both')), all, { value: 5 });
    } else {
      counter(full(name('both')), 7, 2, all);
    }
    c.gauge(name('gauge'), 3, ...tags);
    c.gauge(name('gauge'), 123.5, ...tags);
    gauge(full(name('gauge')), 123.5, all);
    c.gauge(name('delta'), 10, ...tags);
    c.gaugeDelta(name('delta'), 5, ...tags);
    c.gaugeDelta(name('delta'), -3, ...tags);
    gauge(full(name('delta')), sign === 'absolute' ? -3 : 12, all);
    for (const member of ['ann', 'bob', 'ann', 999]) {
      c.set(name('set'), member, ...tags);
      c.unique(name('unique'), member, ...tags);
    }
    metric('SET', full(name('set')), all, { value: 3 });
    metric('SET', full(name('unique')), all, { value: 3 });
    for (const [type, method] of OBSERVED) {
      c[method](name(method), 26, ...tags);
      c[method](name(method), 14.25, ...tags);
      observed(type, full(name(method)), [26, 14.25], 1, all);
    }
  }
}

/// The client means a value; with Etsy's servers, and here by default, it is a change.
function negativeGauge(c) {
  c.gauge('below.zero', 10);
  c.gauge('below.zero', -4);
  gauge('below.zero', sign === 'absolute' ? -4 : 6);
}

/// The rate as an argument, and among options.
function rates(c) {
  for (const [suffix, given, tags] of [['', [0.5], []], ['.options', [{ sampleRate: 0.5, tags: ['a:b'], cardinality: 'high' }], ['a:b']]]) {
    c.increment(`rate.increment${suffix}`, 3, ...given);
    counter(`rate.increment${suffix}`, 6, 0, tags);
    c.decrement(`rate.decrement${suffix}`, 1, ...given);
    counter(`rate.decrement${suffix}`, 0, 2, tags);
    c.gauge(`rate.gauge${suffix}`, 7, ...given);
    gauge(`rate.gauge${suffix}`, 7, tags);
    c.gaugeDelta(`rate.delta${suffix}`, 7, ...given);
    gauge(`rate.delta${suffix}`, 7, tags);
    c.set(`rate.set${suffix}`, 'ann', ...given);
    c.unique(`rate.unique${suffix}`, 'ann', ...given);
    metric('SET', `rate.set${suffix}`, tags, { value: 1 });
    metric('SET', `rate.unique${suffix}`, tags, { value: 1 });
    for (const [type, method] of OBSERVED) {
      c[method](`rate.${method}${suffix}`, 8, ...given);
      observed(type, `rate.${method}${suffix}`, [8], 0.5, tags);
    }
  }
}

function timestamps(c) {
  c.gauge('at.gauge', 17, { timestamp: new Date() });
  gauge('at.gauge', 17);
  c.increment('at.count', 124, { timestamp: Math.floor(Date.now() / 1000), tags: { a: 'b' } });
  counter('at.count', 124, 0, ['a:b']);
  // Long ago: no window has it, and the total has.
  c.increment('at.past', 9, { timestamp: 1713804588 });
  counter('at.past', 9);
  want.unplaced += 1;
}

async function timers(c) {
  assert.equal(c.timer(n => n + 1, 'timer')(7), 8);
  observed('TIMER', 'timer', [250]);
  const tagging = (n, context) => {
    context.addTags({ later: 1 });
    return n;
  };
  c.timer(tagging, 'timer.tags', 0.5, ['a:b'])(7);
  observed('TIMER', 'timer.tags', [250], 0.5, ['a:b', 'later:1']);
  for (const [type, method] of [['TIMER', 'asyncTimer'], ['DISTRIBUTION', 'asyncDistTimer']]) {
    assert.equal(await c[method](async n => n + 1, method)(7), 8);
    observed(type, method, [250]);
    await c[method](async (n, context) => tagging(n, context), `${method}.tags`, 0.5, ['a:b'])(7);
    observed(type, `${method}.tags`, [250], 0.5, ['a:b', 'later:1']);
    await c[method](async n => n, `${method}.options`, { sampleRate: 0.5, tags: ['a:b'] })(7);
    observed(type, `${method}.options`, [250], 0.5, ['a:b']);
    await assert.rejects(c[method](async () => { throw new Error('as meant'); }, `${method}.fails`)());
    observed(type, `${method}.fails`, [250]);
  }
  // A date is the time since then.
  c.timing('timing.date', new Date(Date.now() - 5000));
  want.metrics.push({ type: 'TIMER', name: 'timing.date', tags: {}, fields: { count: 1 } });
}

function events(c, title) {
  c.event(title);
  event(title, title);
  c.event(`${title} full`, 'two\nlines | with: bars', {
    aggregation_key: 'deploys',
    alert_type: 'error',
    date_happened: new Date(1713804588000),
    hostname: 'web1',
    priority: 'low',
    source_type_name: 'jenkins',
    cardinality: 'high',
  }, ['env:prod', 'canary']);
  event(`${title} full`, 'two\nlines | with: bars', {
    aggregation_key: 'deploys',
    alert_type: 'error',
    timestamp: 1713804588,
    host: 'web1',
    priority: 'low',
    source_type: 'jenkins',
    tags: ['canary', 'env:prod'],
  });
}

function checks(c, name) {
  for (const status of Object.values(c.CHECKS)) {
    c.check(`${name}.${status}`, status);
    check(`${name}.${status}`, status);
  }
  const more = { date_happened: new Date(1713804588000), hostname: 'db1', message: 'no answer', cardinality: 'low' };
  c.check(`${name}.full`, c.CHECKS.CRITICAL, more, { b: 1, a: 2 });
  check(`${name}.full`, 2, { timestamp: 1713804588, host: 'db1', message: 'no answer', tags: ['a:2', 'b:1'] });
}

/// Prefixes, suffixes and tags, of a client and of its children.
async function children() {
  const c = client({ prefix: 'shop', suffix: 'v1', globalTags: { region: 'eu', team: 'a' }, sampleRate: 0.5 });
  c.increment('parent');
  counter('shop.parent.v1', 2, 0, ['region:eu', 'team:a']);
  const child = watched(c.childClient({ prefix: 'cart', suffix: 'end', globalTags: ['team:b', 'canary'] }));
  child.increment('child', ['own:1']);
  counter('cart.shop.child.v1.end', 1, 0, ['region:eu', 'team:b', 'canary', 'own:1']);
  const grandchild = watched(child.childClient());
  eachType(grandchild, 'grand.', { constant: ['region:eu', 'team:b', 'canary'], full: name => `cart.shop.${name}.v1.end` });
  child.event('child', 'text');
  event('cart.shop.child.v1.end', 'text', { tags: ['canary', 'region:eu', 'team:b'] });
  child.check('child', 0);
  check('cart.shop.child.v1.end', 0, { tags: ['canary', 'region:eu', 'team:b'] });
  await closed(c);
}

async function buffers() {
  // The kernel holds ten of a unix socket's datagrams, and what it can't take the client sends again behind what comes after
  // it. So it has its buffer there by default.
  const maxBufferSize = transport === 'uds' ? 4000 : 500;
  const c = client({ maxBufferSize, bufferFlushInterval: 5, prefix: 'buffered', globalTags: ['region:eu'] });
  eachType(c, '', { constant: ['region:eu'], full: name => `buffered.${name}` });
  for (let n = 0; n < 300; n += 1) {
    c.increment('many');
  }
  counter('buffered.many', 300, 0, ['region:eu']);
  await new Promise(done => c.flush(done));
  c.increment('flushed');
  c.flush();
  c.increment('flushed', 10);
  counter('buffered.flushed', 11, 0, ['region:eu']);
  // By its own timer.
  await new Promise(done => setTimeout(done, 20));
  await closed(c);
}

async function aggregation() {
  // What is beyond its contexts it sends at once, and says so.
  const errorHandler = error => assert.match(error.message, /aggregation context limit/);
  const c = client({ aggregation: { flushInterval: 20, maxContexts: 20 }, prefix: 'aggregated', errorHandler });
  eachType(c, '', { full: name => `aggregated.${name}`, aggregated: true });
  const child = watched(c.childClient({ globalTags: ['child:1'] }));
  for (const cardinality of [undefined, 'low', 'high']) {
    child.increment('card', 3, { cardinality });
  }
  counter('aggregated.card', 9, 0, ['child:1']);
  await new Promise(done => c.flush(done));
  c.increment('late');
  counter('aggregated.late', 1);
  await closed(c);
}

/// Containers, orchestrators and cardinality: they say where a sample comes from, and make no series of its own.
async function origins() {
  let c = client({ datadog: true, containerID: 'ci-8f7d', cardinality: 'orchestrator' });
  eachType(c, 'origin.container.');
  c.event('origin container', 'text');
  event('origin container', 'text', { container_id: 'ci-8f7d' });
  c.check('origin.container', 0, { message: 'fine' });
  check('origin.container', 0, { container_id: 'ci-8f7d', message: 'fine' });
  await closed(c);
  const environment = {
    DD_ENTITY_ID: '04652bb7-19b7-11e9-9cc6-42010a9c016d',
    DD_ENV: 'prod',
    DD_SERVICE: 'shop',
    DD_VERSION: '1.2',
    DD_EXTERNAL_ENV: 'it-false,cn-web,pu-75a2',
    DD_CARDINALITY: 'low',
  };
  Object.assign(process.env, environment);
  c = client({ globalTags: ['own:1'] });
  const constant = ['own:1', `dd.internal.entity_id:${environment.DD_ENTITY_ID}`, 'env:prod', 'service:shop', 'version:1.2'];
  eachType(c, 'origin.environment.', { constant });
  await closed(c);
  for (const name of Object.keys(environment)) {
    delete process.env[name];
  }
}

/// What the client says about itself.
async function telemetry() {
  const c = client({ includeDatadogTelemetry: true, telemetryFlushInterval: 3600000, maxBufferSize: 0 });
  c.increment('telemetry');
  c.timing('telemetry.timing', 5);
  c.event('telemetry', 'text');
  c.check('telemetry', 1);
  counter('telemetry', 1);
  observed('TIMER', 'telemetry.timing', [5]);
  event('telemetry', 'text');
  check('telemetry', 1);
  await new Promise(done => c.flush(done));
  // The last of it when it closes; the bytes and packets are what it counted itself until then.
  const { bytesSent, packetsSent } = c.telemetry;
  assert.equal(packetsSent, 4);
  await closed(c);
  const tags = ['client:nodejs', `client_version:${require('hot-shots/package.json').version}`, `client_transport:${transport}`];
  const said = { metrics: 2, events: 1, service_checks: 1, bytes_sent: bytesSent, packets_sent: packetsSent };
  for (const [name, value] of Object.entries(said)) {
    counter(`datadog.dogstatsd.client.${name}`, value, 0, tags);
  }
  for (const type of ['count', 'timing']) {
    counter('datadog.dogstatsd.client.metrics_by_type', 1, 0, [...tags, `metrics_type:${type}`]);
  }
}

/// Tags as InfluxDB's agent has them.
async function telegraf() {
  const c = client({ telegraf: true, globalTags: { region: 'eu' } });
  c.increment('telegraf', 3, ['a:b']);
  counter('telegraf', 3, 0, ['region:eu', 'a:b']);
  c.gauge('telegraf.gauge', 4);
  gauge('telegraf.gauge', 4, ['region:eu']);
  await closed(c);
}

function finish() {
  const names = Object.getOwnPropertyNames(StatsD.prototype).filter(name => name !== 'constructor');
  const missing = names.filter(name => !called.has(name) && !(name in LEFT_OUT));
  assert.equal(missing.length, 0, `never called: ${missing}`);
  const stale = Object.keys(LEFT_OUT).filter(name => called.has(name) || !names.includes(name));
  assert.equal(stale.length, 0, `left out, but called or not there: ${stale}`);
  want.methods = names.filter(name => called.has(name)).map(name => `StatsD.${name}`).sort();
  console.log(JSON.stringify(want));
}

async function main() {
  const c = client({});
  eachType(c, '');
  negativeGauge(c);
  rates(c);
  timestamps(c);
  await timers(c);
  events(c, 'plain');
  checks(c, 'plain');
  await closed(c);
  for (const exercise of [children, buffers, aggregation, origins, telemetry, telegraf]) {
    await exercise();
  }
  finish();
}

main().catch(error => {
  console.error(error);
  process.exit(1);
});

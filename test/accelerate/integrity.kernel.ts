/** Streams whose every byte is compared: on plain TCP, under two naive ways of acceleration, which have to fail, and under sidestep's. */
import test, {type ExecutionContext} from 'ava';
import {World, type Pod} from '../helpers/world.js';
import {allLocal, disturb, oneHop} from './arrangements.js';
import {attachNaive, type Naive} from './naive.js';
import {allowFastOpen, runH13, runHalfRead, runStopped, runStreams, startStreams, streamsResult, type StoppedRound, type StreamsRun} from './streams.js';

const LOCAL = ['127.0.0.1', '::1'];
const DUPLEX = ['--duplex', '64M', '--streams', '4', '--lanes', '4'];

const ARRANGEMENTS = [
	{title: 'one hop', arrange: oneHop},
	{title: 'all hops local', arrange: allLocal},
] as const;

function onePod(t: ExecutionContext): Pod {
	const pod = World.create(t).pod('pod');
	allowFastOpen(pod);
	return pod;
}

function assertWhole(t: ExecutionContext, {failures, result}: StreamsRun, streams: number): void {
	t.deepEqual(failures, []);
	t.deepEqual([result.streams, result.wrong, result.hung], [streams, 0, 0]);
	t.true(result.fast_opened > result.drawn['fast_open']! / 2, 'Fast Opens carried data in their SYN');
	// A suite that no longer draws one of these would prove less than it says.
	for (const [trait, count] of Object.entries(result.drawn)) {
		t.true(count > streams / 20, `${count} of ${streams} were drawn with ${trait}`);
	}

	t.log(JSON.stringify(result));
}

function median(rounds: readonly StoppedRound[], key: 'accepted' | 'memory'): number {
	return rounds.map(round => round[key]).sort((a, b) => a - b)[rounds.length >> 1]!;
}

test.serial('plain TCP passes: what the suite finds elsewhere is not its own', async t => {
	const pod = onePod(t);
	const run = await runStreams(pod, pod, LOCAL, ['--streams', '1000']);
	assertWhole(t, run, 1000);
	t.is(run.result.fionread.wrong, 0);
	for (const recipe of [runH13, runHalfRead]) {
		t.deepEqual(await recipe(pod, pod, '127.0.0.1', ['--rounds', '4', '--hung', '2']), {rounds: 4, stuck: 0});
	}

	t.deepEqual((await runStreams(pod, pod, LOCAL, DUPLEX)).failures, []);
	t.true((await runStopped(pod, pod, '127.0.0.1', ['--rounds', '2'])).every(({all}) => all));
});

for (const [name, title] of [
	['naive_known_peer', 'redirecting whenever the peer is known'],
	['naive_two_queues', 'falling back with two queues, and returning at once'],
] satisfies ReadonlyArray<[Naive, string]>) {
	test.serial(`${title} is found to be wrong`, async t => {
		const pod = onePod(t);
		const redirected = attachNaive(pod.world, name);
		const {failures, result, text} = await runStreams(pod, pod, LOCAL, ['--streams', '1000', '--hung', '2', '--max-failures', '5']);
		t.true(redirected() > 0n);
		t.true(failures.some(({failure}) => failure === 'reordered'), text);
		t.true(result.streams < 1000, 'it stopped early');
		t.log(failures.map(({stream, failure}) => `${stream} ${failure}`).join(', '), `${result.seconds} s`);
	});
}

test.serial('an edge-triggered reader that takes a short read for drained hangs where there are two queues', async t => {
	const pod = onePod(t);
	attachNaive(pod.world, 'naive_two_queues');
	t.deepEqual(await runH13(pod, pod, '127.0.0.1', ['--rounds', '2', '--hung', '2']), {rounds: 2, stuck: 2});
});

for (const name of ['naive_known_peer', 'naive_two_queues'] as const) {
	test.serial(`half a message unread is overtaken under ${name}`, async t => {
		const pod = onePod(t);
		attachNaive(pod.world, name);
		t.is((await runHalfRead(pod, pod, '127.0.0.1', ['--rounds', '2', '--hung', '2'])).failure, 'reordered');
	});

	test.serial(`a client that blocks, and reads and writes in two threads, goes wrong under ${name}`, async t => {
		const pod = onePod(t);
		attachNaive(pod.world, name);
		const {failures, text} = await runStreams(pod, pod, LOCAL, ['--duplex', '2G', '--streams', '4', '--lanes', '4', '--hung', '5']);
		t.true(failures.length > 0, text);
		t.log(failures.map(({failure}) => failure).join(', '));
	});
}

test.serial('a stopped reader takes without bound where nothing looks at its buffer', async t => {
	const pod = onePod(t);
	const plain = await runStopped(pod, pod, '127.0.0.1', ['--rounds', '1']);
	attachNaive(pod.world, 'naive_known_peer');
	const naive = await runStopped(pod, pod, '127.0.0.1', ['--rounds', '1', '--most', '128M']);
	t.true(median(naive, 'accepted') > 4 * median(plain, 'accepted'), JSON.stringify({plain, naive}));
});

for (const {title, arrange} of ARRANGEMENTS) {
	test.serial(`accelerated streams are whole: ${title}`, async t => {
		const {client, server, to, redirectedBytes} = await arrange(World.create(t));
		assertWhole(t, await runStreams(client, server, to, ['--streams', '1000', '--lanes', '128']), 1000);
		const streamed = redirectedBytes();
		t.true(streamed > 1 << 20, `${streamed} bytes were redirected`);
		t.log(`${streamed} bytes redirected`);
	});

	for (const [recipe, reader] of [[runH13, 'an edge-triggered reader that takes a short read for drained'], [runHalfRead, '… and has half a message unread when its socket is enrolled']] as const) {
		test.serial(`${reader}: ${title}`, async t => {
			const {client, server, to, redirectedBytes} = await arrange(World.create(t));
			t.deepEqual(await recipe(client, server, to[0]!, ['--hung', '10']), {rounds: 10, stuck: 0});
			t.true(redirectedBytes() > 0);
		});
	}

	test.serial(`a client that blocks, and reads and writes in two threads, sees no EAGAIN: ${title}`, async t => {
		const {client, server, to} = await arrange(World.create(t));
		t.deepEqual((await runStreams(client, server, to, DUPLEX)).failures, []);
	});

	test.serial(`a stopped reader holds no more than 2 × plain TCP, and gets all of it in the end: ${title}`, async t => {
		const {client, server, to, redirectedBytes} = await arrange(World.create(t));
		const {world} = client;
		t.is(world.sidestep('acceleration', 'off').code, 0);
		const plain = await runStopped(client, server, to[0]!, ['--rounds', '5']);
		const before = redirectedBytes();
		t.is(world.sidestep('acceleration', 'on').code, 0);
		const accelerated = await runStopped(client, server, to[0]!, ['--rounds', '5']);
		t.true(redirectedBytes() > before);
		for (const key of ['accepted', 'memory'] as const) {
			t.true(median(accelerated, key) <= 2 * median(plain, key), `${key}: ${JSON.stringify({plain, accelerated})}`);
		}

		t.true(accelerated.every(({all}) => all));
	});
}

test.serial('streams stay whole while acceleration is switched, and agents are killed and started', async t => {
	const arrangement = await allLocal(World.create(t));
	const {client, server, to, redirectedBytes} = arrangement;
	const running = startStreams(client, server, to, ['--streams', '500', '--max-bytes', '16M']);
	const {switches, kills} = await disturb(arrangement, running.ended);
	assertWhole(t, await streamsResult(running), 500);
	t.true(switches > 5 && kills > 0, `${switches} switches, ${kills} kills`);
	t.true(redirectedBytes() > 1 << 20);
});

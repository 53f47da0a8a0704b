/**
`npm run bench`: how fast bytes go through one proxy, and through one on each side, under Istio's iptables rules, under sidestep with and without acceleration,
and without a proxy. All sides in one run, round by round, on one CPU; nothing of the host's own network is touched, and everything goes at the end, also on
Ctrl-C.
*/
import {constants, loadavg, setPriority} from 'node:os';
import {setImmediate as nextTurn} from 'node:timers/promises';
import {toJson, toTable} from '../src/cli/format.js';
import {describePods} from '../src/cli/read.js';
import {openDatapath, type Datapath} from '../src/loader/datapath.js';
import {native} from '../src/native.js';
import {SIDECAR_ID, sidecarRules} from '../test/helpers/istio-rules.js';
import type {As, Pod, World} from '../test/helpers/world.js';
import {parseOptions, pinToLastCpu, runBench} from './frame.js';
import {median, readPrograms} from './series.js';

const USAGE = 'traffic [-o table|json] [--rounds N] [--exchanges N] [--connections N] [--mebibytes N]';
const PORT = 8080;
const MESSAGE_BYTES = 64;
const WRITE_BYTES = 131_072;
/** Before what is measured: of connections, and of exchanges on one, twice, with time for enrolment between. */
const WARM_UP = 100;
/** Of two sides that are equally fast, the medians differ by so much. */
const NOISE = 0.03;

type Topology = 'direct' | 'one hop' | 'all local';
type Variant = 'direct' | 'iptables' | 'redirect only' | 'accelerated';
type Options = Readonly<Record<'rounds' | 'exchanges' | 'connections' | 'mebibytes', number>>;

/** What is measured: µs, connections a second, Gbit/s. */
const METRICS = {
	exchangeP50: {title: 'exchange p50', digits: 1},
	exchangeP99: {title: 'exchange p99', digits: 1},
	connectRate: {title: 'connections/s', digits: 0},
	connectP99: {title: 'connection p99', digits: 0},
	streamRate: {title: 'stream', digits: 2},
	chattyStreamRate: {title: 'stream after exchanges', digits: 2},
} as const;
type Metric = keyof typeof METRICS;
const METRIC_NAMES = Object.keys(METRICS) as readonly Metric[];
type Round = Readonly<Record<Metric, number>>;

interface Target {
	readonly topology: Topology;
	readonly metric: Metric;
	readonly against: Variant;
	readonly limit: number;
	readonly holds: 'at most' | 'at least';
}

const TARGETS: readonly Target[] = [
	{topology: 'one hop', metric: 'exchangeP50', against: 'iptables', limit: 0.75, holds: 'at most'},
	{topology: 'all local', metric: 'exchangeP50', against: 'iptables', limit: 0.58, holds: 'at most'},
	...(['one hop', 'all local'] as const).flatMap(topology => (['redirect only', 'iptables'] as const).flatMap((against): Target[] => [
		{topology, metric: 'connectRate', against, limit: 1 - NOISE, holds: 'at least'},
		{topology, metric: 'connectP99', against, limit: 1 + NOISE, holds: 'at most'},
		{topology, metric: 'streamRate', against, limit: 1 - NOISE, holds: 'at least'},
		{topology, metric: 'chattyStreamRate', against, limit: 1 - NOISE, holds: 'at least'},
	])),
];

/** Pairs of sockets on a connection's way that can be accelerated: with the server one that is not enrolled, or one that is. */
const PAIRS: Readonly<Record<Topology, number>> = {direct: 0, 'one hop': 1, 'all local': 3};

interface Taken {
	readonly taken: number;
	readonly p50: number;
	readonly p99: number;
}

interface ProgramTime {
	readonly program: string;
	/** For each exchange, or connection. */
	readonly runs: number;
	/** Of one run. */
	readonly ns: number;
}

/** From one client to one server. */
class Route {
	readonly rounds: Round[] = [];
	/** Of the messages of exchanges, the part that was redirected. */
	readonly redirected: number[] = [];

	constructor(readonly topology: Topology, readonly variant: Variant, readonly client: Pod, readonly server: Pod, readonly as: As) {}

	measure({exchanges, connections, mebibytes}: Options, datapath: Datapath): void {
		const before = this.#messages(datapath);
		const exchange = this.#exchange(exchanges);
		const after = this.#messages(datapath);
		const moved = after.redirected - before.redirected;
		const messages = 2 * PAIRS[this.topology];
		const connect = this.#connect(connections);
		const {redirected, accelerated} = this.#messages(datapath);
		const title = `${this.topology}, ${this.variant}`;
		if (this.variant === 'accelerated' ? moved < messages * exchanges : moved > 0) {
			throw new Error(`${title}: ${moved} messages were redirected in ${exchanges} exchanges`);
		}

		if (redirected !== after.redirected || accelerated !== after.accelerated) {
			throw new Error(`${title}: connections with one exchange were accelerated`);
		}

		this.redirected.push(moved / (messages * (exchanges + 2 * WARM_UP)));
		this.rounds.push({
			exchangeP50: exchange.p50 / 1000,
			exchangeP99: exchange.p99 / 1000,
			connectRate: connections * 1e9 / connect.taken,
			connectP99: connect.p99 / 1000,
			streamRate: this.#stream(0, mebibytes),
			chattyStreamRate: this.#stream(WARM_UP, mebibytes),
		});
	}

	/** @returns the median, µs. */
	exchangeOverUnix({exchanges}: Options): number {
		return this.#measure('unix', WARM_UP, exchanges).p50 / 1000;
	}

	get medians(): Round {
		return fromMetrics(metric => median(this.rounds.map(round => round[metric])));
	}

	/** The median over the rounds of how this compares to `other` in the same round. */
	ratioTo(other: Route): Round {
		return fromMetrics(metric => median(this.rounds.map((round, index) => round[metric] / other.rounds[index]![metric])));
	}

	/** Once more, as reading the clock for each run costs time itself. */
	programTimes({exchanges, connections}: Options, datapath: Datapath) {
		const stats = native.enableStats();
		try {
			return {
				exchange: programTimes(datapath, exchanges + 2 * WARM_UP, () => this.#exchange(exchanges)),
				connection: programTimes(datapath, connections + WARM_UP, () => this.#connect(connections)),
			};
		} finally {
			native.closeFd(stats);
		}
	}

	#messages(datapath: Datapath) {
		const pods = describePods(datapath).filter(({name}) => [this.client, this.server].some(pod => name === entryName(pod)));
		const sum = (values: ReadonlyArray<bigint | undefined>) => Number(values.reduce<bigint>((total, value) => total + (value ?? 0n), 0n));
		return {
			redirected: sum(pods.flatMap(({acceleration: {sentByClient, sentByServer}}) => [sentByClient.redirected.messages, sentByServer.redirected.messages])),
			accelerated: sum(pods.map(({reasons}) => reasons['accelerated'])),
		};
	}

	#exchange(count: number): Taken {
		return this.#run('exchanges', WARM_UP, count);
	}

	#connect(count: number): Taken {
		return this.#run('connections', WARM_UP, count);
	}

	/** @returns Gbit/s. */
	#stream(exchangesBefore: number, mebibytes: number): number {
		const bytes = mebibytes * 1_048_576;
		return bytes * 8 / this.#run('stream', exchangesBefore, bytes, WRITE_BYTES).taken;
	}

	#run(what: 'exchanges' | 'connections' | 'stream', ...counts: readonly number[]): Taken {
		return this.#measure(what, `${this.server.ipv4}:${PORT}`, ...counts);
	}

	#measure(...words: ReadonlyArray<string | number>): Taken {
		const {code, stdout, stderr} = this.client.run([this.client.world.program('traffic'), ...words.map(String)], this.as);
		if (code !== 0) {
			throw new Error(`${this.topology}, ${this.variant}: ${stderr}`);
		}

		return JSON.parse(stdout) as Taken;
	}
}

type Report = Awaited<ReturnType<typeof bench>>;

const fromMetrics = (value: (metric: Metric) => number) => Object.fromEntries(METRIC_NAMES.map(metric => [metric, value(metric)])) as Round;
const entryName = (pod: Pod) => `bench/${pod.name}`;

function programTimes(datapath: Datapath, count: number, act: () => void): readonly ProgramTime[] {
	const before = readPrograms(datapath);
	act();
	return [...readPrograms(datapath)].flatMap(([program, {runs, ns}]) => {
		const ran = runs - before.get(program)!.runs;
		return ran > 0 ? [{program, runs: ran / count, ns: (ns - before.get(program)!.ns) / ran}] : [];
	});
}

async function ready(pod: Pod, command: readonly string[], as: As): Promise<void> {
	const running = pod.start(command, as);
	await running.until('ready', () => running.stdout.includes('"ready":true'));
}

const serve = async (pod: Pod, as: As) => ready(pod, [pod.world.program('traffic'), 'serve', `0.0.0.0:${PORT}`], as);

/**
Two pods with a sidecar each, for each way of capturing.

@param captured - where sidestep's programs are attached: nobody else pays for them.
*/
async function buildRoutes(world: World, captured: Required<Pick<As, 'cgroup'>>): Promise<readonly Route[]> {
	const far = world.pod('far');
	await serve(far, {});
	const routes = [new Route('direct', 'direct', world.pod('bare'), far, {})];
	const entries: object[] = [];
	for (const variant of ['iptables', 'redirect only', 'accelerated'] as const) {
		const as = variant === 'iptables' ? {} : captured;
		const [client, server] = ['client', 'server'].map(role => world.pod(`${role}-${variant.replace(' only', '')}`)) as [Pod, Pod];
		for (const pod of [client, server]) {
			await ready(pod, [world.program('relay'), '0.0.0.0:15001', '0.0.0.0:15006'], {...as, uid: SIDECAR_ID, gid: SIDECAR_ID});
			if (variant === 'iptables') {
				sidecarRules(pod);
			} else {
				entries.push({name: entryName(pod), netns: pod.netns, mode: 'sidecar', acceleration: variant === 'accelerated' ? 'on' : 'off'});
			}
		}

		await serve(server, as);
		routes.push(new Route('one hop', variant, client, far, as), new Route('all local', variant, client, server, as));
	}

	await world.agent(entries, ['--cgroup', captured.cgroup, '--acceleration', 'on']);
	return routes;
}

/** The ratio to iptables if the bytes of each pair that can be accelerated took as long as over AF_UNIX; of a pair that cannot, as long as without a proxy. */
function floor(topology: 'one hop' | 'all local', find: (topology: Topology, variant: Variant) => Route, unix: readonly number[]): number {
	const p50 = (route: Route, round: number) => route.rounds[round]!.exchangeP50;
	const rest = (round: number) => topology === 'one hop' ? p50(find('direct', 'direct'), round) : 0;
	return median(unix.map((value, round) => (PAIRS[topology] * value + rest(round)) / p50(find(topology, 'iptables'), round)));
}

async function bench(world: World, options: Options, stop: AbortSignal) {
	const machine = pinToLastCpu();
	// Before whatever else the machine does; what is started inherits it.
	setPriority(constants.priority.PRIORITY_HIGHEST);
	const routes = await buildRoutes(world, {cgroup: world.subCgroup('sidestep')});
	const datapath = openDatapath(world.bpffs);
	const unix: number[] = [];
	try {
		for (let round = 0; round < options.rounds; round++) {
			for (const route of round % 2 === 0 ? routes : routes.toReversed()) {
				route.measure(options, datapath);
				await nextTurn(undefined, {signal: stop});
			}

			unix.push(routes[0]!.exchangeOverUnix(options));
		}

		const find = (topology: Topology, variant: Variant) => routes.find(route => route.topology === topology && route.variant === variant)!;
		return {
			...machine,
			/** Of the last minute: above 1, other work took its part. */
			load: loadavg()[0]!,
			...options,
			units: {quantiles: 'µs', rates: 'connections/s', streams: 'Gbit/s', programs: 'ns'},
			messageBytes: MESSAGE_BYTES,
			writeBytes: WRITE_BYTES,
			cells: routes.map(route => ({
				topology: route.topology,
				variant: route.variant,
				...route.medians,
				ratioToIptables: route.topology === 'direct' ? undefined : route.ratioTo(find(route.topology, 'iptables')),
				ratioToRedirectOnly: route.variant === 'accelerated' ? route.ratioTo(find(route.topology, 'redirect only')) : undefined,
				redirected: route.variant === 'accelerated' ? median(route.redirected) : 0,
				programs: route.as.cgroup === undefined ? undefined : route.programTimes(options, datapath),
				roundValues: route.rounds,
			})),
			unix: {exchangeP50: median(unix), oneHop: floor('one hop', find, unix), allLocal: floor('all local', find, unix)},
			targets: TARGETS.map(target => {
				const ratio = find(target.topology, 'accelerated').ratioTo(find(target.topology, target.against))[target.metric];
				return {...target, ratio, reached: target.holds === 'at most' ? ratio <= target.limit : ratio >= target.limit};
			}),
		};
	} finally {
		datapath.close();
	}
}

function toText({kernel, cpu, iptables, load, rounds, exchanges, connections, mebibytes, cells, unix, targets}: Report): string {
	const columns = (round: Round | undefined, digits?: number) => Object.fromEntries(METRIC_NAMES.map(metric => [METRICS[metric].title, round?.[metric].toFixed(digits ?? METRICS[metric].digits)]));
	const percent = (part: number) => `${(100 * part).toFixed(0)} %`;
	const measured = cells.map(({topology, variant, redirected, ...cell}) => ({topology, variant, ...columns(cell), redirected: percent(redirected)}));
	const compared = cells.flatMap(({topology, variant, ratioToIptables, ratioToRedirectOnly}) => [
		...variant === 'direct' || variant === 'iptables' ? [] : [{topology, variant, 'ratio to': 'iptables', ...columns(ratioToIptables, 2)}],
		...ratioToRedirectOnly ? [{topology, variant, 'ratio to': 'redirect only', ...columns(ratioToRedirectOnly, 2)}] : [],
	]);
	const spent = cells.flatMap(({topology, variant, programs}) => Object.entries(programs ?? {}).map(([each, times]) => ({
		topology, variant, each,
		'ns': times.reduce((sum, {runs, ns}) => sum + runs * ns, 0).toFixed(0),
		'runs × ns each': times.map(({program, runs, ns}) => `${program} ${runs.toFixed(1)} × ${ns.toFixed(0)}`).join(', '),
	})));
	const judged = targets.map(({topology, metric, against, limit, holds, ratio, reached}) => ({
		target: reached ? 'reached' : 'MISSED', topology, metric, 'accelerated to': against, ratio: ratio.toFixed(2), wanted: `${holds} ${limit}`,
	}));
	return [
		`kernel ${kernel}; ${cpu}; ${iptables}; load average ${load.toFixed(1)}`,
		`exchange and connection in µs, stream in Gbit/s; medians of ${rounds} rounds of ${exchanges} exchanges of ${MESSAGE_BYTES} B on one connection, ${connections} connections with one exchange each, ${mebibytes} MiB in writes of`
		+ ` ${WRITE_BYTES / 1024} KiB on a new connection and on one after ${2 * WARM_UP} exchanges`,
		'',
		toTable(measured, ''),
		toTable(compared, ''),
		`an exchange between two processes over AF_UNIX: ${unix.exchangeP50.toFixed(1)} µs. Were accelerated pairs that fast, the exchange would have this ratio to iptables: one hop ${unix.oneHop.toFixed(2)}, all local ${unix.allLocal.toFixed(2)}`,
		'',
		'BPF run time',
		toTable(spent, ''),
		toTable(judged, ''),
	].join('\n');
}

const {output, counts} = parseOptions(USAGE, {rounds: 20, exchanges: 2000, connections: 200, mebibytes: 64});
await runBench(async (world, stop) => {
	const report = await bench(world, counts, stop);
	return output === 'json' ? toJson(report) : toText(report);
});

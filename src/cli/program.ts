import {setTimeout as sleep} from 'node:timers/promises';
import {Argument, Command, CommanderError, InvalidArgumentError, Option} from 'commander';
import {runAgent, type AgentOptions} from '../agent.js';
import {integer} from '../arguments.js';
import {addCniCommand, cniConfOption} from '../cni/command.js';
import {networksWithPlugin} from '../cni/install.js';
import {AgentError, InputError, NotLoadedError, PodError, reasonOf} from '../errors.js';
import {Datapath, PROGRAMS, finishInterrupted, openDatapath, unload} from '../loader/datapath.js';
import {DEFAULT_BPFFS, isBpffs, requireCapabilities} from '../loader/host.js';
import {describeAcceleration, setAcceleration, wishNow, type AccelerationWish} from '../loader/acceleration.js';
import {isAgentRunning, takeWriterLock} from '../loader/lock.js';
import {openObject, packageVersion} from '../loader/object.js';
import {PinLayout} from '../loader/paths.js';
import {checkHost} from '../loader/probes.js';
import {canonicalAddress, isIpv4Address} from '../maps/address.js';
import {MAP_NAMES, UNWALKABLE, type MapName} from '../maps/schema.js';
import {leaveNamespaces} from '../pods/reconcile.js';
import {parseListenAddress} from '../metrics/server.js';
import {addNodeOptions, kubernetesOptions, type NodeCliOptions} from '../node/options.js';
import type {Environment} from './environment.js';
import {outputOption, toJson, toTable, type OutputFormat, type Row} from './format.js';
import {countMissed, describePods, dumpMap, explain, findPods, inboundDecision, listMaps, podSockets, statusRows} from './read.js';

const EXIT_FAILED = 1;
const EXIT_MISUSE = 2;

interface ReadOptions {
	readonly bpffs: string;
	readonly output: OutputFormat;
}

/**
Runs one command.

@returns the exit code: 0 done, 1 failed, 2 misuse.
*/
export async function main(argv: readonly string[], environment: Environment): Promise<number> {
	let code = 0;
	const program = createProgram(environment, failed => {
		code = failed;
	});
	try {
		await program.parseAsync(argv, {from: 'user'});
		return code;
	} catch (error) {
		if (error instanceof CommanderError) {
			return error.exitCode === 0 ? 0 : EXIT_MISUSE;
		}

		environment.stderr(`sidestep: ${error instanceof AgentError ? error.message : reasonOf(error)}\n`);
		return error instanceof AgentError && error.code === 'ERR_INPUT' ? EXIT_MISUSE : EXIT_FAILED;
	}
}

function createProgram(environment: Environment, setCode: (code: number) => void): Command {
	const {stdout, stderr, signal} = environment;
	const bpffs = () => new Option('--bpffs <directory>', 'bpf file system that holds the pins').env('SIDESTEP_BPFFS').default(DEFAULT_BPFFS);
	const cgroup = () => new Option('--cgroup <directory>', 'cgroup v2 directory to attach to (default: its root)').env('SIDESTEP_CGROUP');
	const proc = () => new Option('--proc <directory>', 'the host\'s /proc').env('SIDESTEP_PROC').default('/proc');
	const show = (format: OutputFormat, rows: readonly Row[], emptyText: string) => {
		stdout(format === 'json' ? toJson(rows) : toTable(rows, emptyText));
	};

	const read = async (options: ReadOptions, act: (datapath: Datapath) => void) => {
		const datapath = openDatapath(options.bpffs);
		try {
			act(datapath);
		} finally {
			datapath.close();
		}
	};

	const program = new Command('sidestep')
		.description('Sends pods\' connections to a local proxy with eBPF instead of iptables')
		.version(packageVersion())
		.exitOverride()
		.configureOutput({writeOut: stdout, writeErr: stderr})
		.showHelpAfterError('(see --help)');
	program.helpCommand(true);

	addNodeOptions(program.command('run')
		.description('run the agent: load, attach, and keep the kernel equal to what pods should have')
		.option('--pods-file <file>', 'which pods to enrol (YAML), instead of a cluster\'s; watched for changes')
		.addOption(bpffs())
		.addOption(cgroup())
		.addOption(proc())
		.addOption(new Option('--node-netns <file>', 'the node\'s own network namespace, whose probes pass (default: process 1\'s)').env('SIDESTEP_NODE_NETNS'))
		.addOption(new Option('--acceleration <mode>', 'local bytes past the TCP stack (default: as before, at first off)').choices(['off', 'auto', 'on']).env('SIDESTEP_ACCELERATION'))
		.option('--reset-older', 'abort connections that are older than their pod\'s enrolment, as iptables would', false)
		.addOption(new Option('--metrics-address <address:port>', 'where /metrics, /healthz and /readyz are served').env('SIDESTEP_METRICS_ADDRESS').default('127.0.0.1:9478'))
		.option('--resync <ms>', 'look at every pod in this time, although nothing changed (default: 10 s, and 0.4 s a pod)', integer(100, 3_600_000))
		.option('--max-pods <number>', 'capacity of the maps, when they are made', integer(1, 1_000_000), 1024))
		.addHelpText('after', '\nExamples:\n  sidestep run --pods-file /etc/sidestep/pods.yaml\n  sidestep run --node worker-1\n\nSIGTERM and SIGINT stop the agent and leave capture in place.')
		.action(async (options: RunOptions) => {
			await runAgent({
				pods: podsOf(options),
				bpffs: options.bpffs,
				cgroup: options.cgroup,
				proc: options.proc,
				metrics: parseListenAddress(options.metricsAddress, '--metrics-address'),
				resyncMs: options.resync,
				maxPods: options.maxPods,
				nodeNetns: options.nodeNetns,
				resetOlder: options.resetOlder,
				acceleration: options.acceleration,
				log(line) {
					stderr(`${new Date().toISOString()} ${line}\n`);
				},
				signal,
			});
		});

	program.command('check')
		.description('try what this kernel can do: what works, what degrades, what is missing')
		.addOption(bpffs())
		.addOption(cgroup())
		.addOption(outputOption())
		.addHelpText('after', '\nExit code 1 if anything that capture needs is missing.')
		.action((options: ReadOptions & {cgroup?: string}) => {
			const findings = checkHost(options);
			show(options.output, findings.map(finding => ({...finding})), 'nothing was checked');
			if (findings.some(({state}) => state === 'missing')) {
				setCode(EXIT_FAILED);
			}
		});

	program.command('status')
		.description('what is loaded and attached, and whether an agent runs')
		.addOption(bpffs())
		.addOption(cniConfOption())
		.addOption(outputOption())
		.action(async (options: ReadOptions & {cniConf: string}) => read(options, datapath => {
			const status = statusRows(datapath, {agentRunning: isAgentRunning(datapath.layout), networks: networksWithPlugin(options.cniConf)});
			if (options.output === 'json') {
				stdout(toJson(status));
				return;
			}

			const {programs, ...facts} = status;
			stdout(Object.entries(facts).map(([name, value]) => `${name}: ${String(value)}\n`).join(''));
			stdout(`\n${toTable(programs, 'no programs')}`);
		}));

	program.command('pods')
		.description('enrolled pods, and what became of their connections')
		.argument('[name]', 'one pod, with every reason, and how many of its connections are older than its enrolment')
		.addOption(proc())
		.addOption(bpffs())
		.addOption(outputOption())
		.action(async (name: string | undefined, options: ReadOptions & {proc: string}) => read(options, datapath => {
			const pods = describePods(datapath).filter(pod => name === undefined || pod.name === name);
			if (name !== undefined && pods.length === 0) {
				stderr(`sidestep: no pod ${name} is enrolled: see \`sidestep pods\`\n`);
				setCode(EXIT_FAILED);
				return;
			}

			if (options.output === 'json') {
				stdout(toJson(pods));
			} else if (name === undefined) {
				show('table', pods.map(({reasons: _, exempt: __, enrolledAt: ___, flags: ____, acceleration: _____, ...row}) => row), 'no pod is enrolled');
			} else {
				const {reasons, ...described} = pods[0]!;
				const facts = {...described, missed: countMissed(datapath, name, options.proc) ?? 'unknown: needs root'};
				stdout(Object.entries(facts).map(([key, value]) => `${key}: ${typeof value === 'object' ? toJson(value, 0).trim() : String(value)}\n`).join(''));
				stdout(`\n${toTable(Object.entries(reasons).map(([reason, connections]) => ({reason, connections})), 'no counters')}`);
			}
		}));

	program.command('acceleration')
		.description('shows or sets whether bytes between sockets of this node go past the TCP stack')
		.addArgument(new Argument('[mode]', 'for all pods that do not say otherwise').choices(['off', 'auto', 'on']))
		.addOption(bpffs())
		.action(async (mode: AccelerationWish | undefined, options: ReadOptions) => read(options, datapath => {
			stdout(`${mode === undefined ? wishNow(datapath) : describeAcceleration(setAcceleration(datapath, mode))}\n`);
		}));

	program.command('sockets')
		.description('TCP sockets of enrolled pods: captured or not, and what would become of each if it were made now')
		.argument('[name]', 'one pod')
		.option('--missed', 'only those that would be captured now and are not: older than their pod\'s enrolment', false)
		.option('--reset', 'abort those that are missed: applications reconnect, and are captured', false)
		.addOption(proc())
		.addOption(bpffs())
		.addOption(outputOption())
		.action(async (name: string | undefined, options: ReadOptions & {missed: boolean; reset: boolean; proc: string}) => read(options, datapath => {
			const found = findPods(datapath, name).flatMap(pod => {
				const sockets = podSockets(datapath, pod, {proc: options.proc, onlyMissed: options.missed || options.reset, reset: options.reset});
				if (!sockets) {
					stderr(`sidestep: the namespace of pod ${pod.info.name} is not found: it has ended, or this process lacks CAP_SYS_PTRACE\n`);
					setCode(EXIT_FAILED);
				}

				return sockets ?? [];
			});
			show(options.output, found.flatMap(({rows}) => rows), 'no sockets');
			if (options.reset) {
				stderr(`reset ${found.reduce((sum, {reset}) => sum + reset, 0)} connections\n`);
			}
		}));

	program.command('explain')
		.description('what would become of a connection, by the same code and maps that decide about real ones')
		.argument('<name>', 'the pod')
		.requiredOption('--to <address:port>', 'its destination', endpoint)
		.option('--from <address:port>', 'its source, if it is bound; for --in the client', endpoint)
		.option('--in', 'it comes from outside to the pod', false)
		.option('--udp', 'DNS over UDP', false)
		.option('--uid <number>', 'who made the socket', integer(0, 0xff_ff_ff_fe), 0)
		.option('--gid <number>', 'with which group', integer(0, 0xff_ff_ff_fe), 0)
		.option('--mark <number>', 'SO_MARK', integer(0, 0xff_ff_ff_ff), 0)
		.addOption(bpffs())
		.addOption(outputOption())
		.addHelpText('after', '\nExample:\n  sidestep explain shop/web --to 10.96.0.10:443 --uid 1000\n\nProbes of the node pass by a note that exists only while they run, so --in does not show them.')
		.action(async (name: string, options: ReadOptions & {to: Endpoint; from?: Endpoint; in: boolean; udp: boolean; uid: number; gid: number; mark: number}) => read(options, datapath => {
			const [pod] = findPods(datapath, name);
			const {outbound, inbound} = explain(datapath, {
				netns: pod!.cookie,
				source: options.from?.address ?? '',
				destination: options.to.address,
				sourcePort: options.from?.port ?? 0,
				destinationPort: options.to.port,
				protocol: options.udp ? 17 : 6,
				mark: options.mark,
				uid: options.uid,
				gid: options.gid,
				interface: 0,
				inExemptCgroup: 0,
			});
			const isOther = options.udp && (pod!.value.dnsPort === 0 || options.to.port !== 53);
			show(options.output, [{pod: name, decision: isOther ? 'not tcp, nor captured dns' : options.in ? inboundDecision(datapath, pod!, options.to, inbound) : outbound}], '');
		}));

	const map = program.command('map').description('the kernel\'s maps');
	map.command('list')
		.description('all maps with their fill')
		.addOption(bpffs())
		.addOption(outputOption())
		.action(async (options: ReadOptions) => read(options, datapath => {
			show(options.output, listMaps(datapath), 'no maps');
		}));
	map.command('dump')
		.description('all entries of one map')
		.addArgument(new Argument('<name>', 'the map').choices(MAP_NAMES.filter(name => !UNWALKABLE.includes(name))))
		.addOption(bpffs())
		.addOption(outputOption())
		.action(async (name: MapName, options: ReadOptions) => read(options, datapath => {
			show(options.output, dumpMap(datapath, name), 'the map is empty');
		}));

	program.command('unload')
		.description('take programs, maps and pins away: pods connect directly from then on')
		.option('--drain', 'first wait until no accelerated connection is open; without it they are reset', false)
		.addOption(proc())
		.addOption(bpffs())
		.addOption(cniConfOption())
		.action(async (options: {bpffs: string; proc: string; cniConf: string; drain: boolean}) => {
			requireCapabilities();
			for (const network of networksWithPlugin(options.cniConf)) {
				stderr(`sidestep: the CNI plugin stays in ${network}: no pod starts while no agent answers it. \`sidestep cni uninstall\` takes it out\n`);
			}

			if (!isBpffs(options.bpffs)) {
				stdout('nothing is loaded\n');
				return;
			}

			const opened = openObject();
			opened.object.close();
			const lock = takeWriterLock(new PinLayout(options.bpffs, opened.schema.layoutVersion));
			try {
				finishInterrupted(lock);
				if (options.drain && !await drain(options.bpffs)) {
					stderr('sidestep: interrupted: nothing is unloaded, and acceleration stays off\n');
					setCode(EXIT_FAILED);
					return;
				}

				for (const problem of restoreLoaded(options)) {
					stderr(`sidestep: ${problem.message}\n`);
					if (problem instanceof PodError) {
						setCode(EXIT_FAILED);
					}
				}

				stdout(unload(lock) ? `unloaded: ${PROGRAMS.length} programs are detached, all pins are gone\n` : 'nothing is loaded\n');
			} finally {
				lock.release();
			}
		});

	addCniCommand(program, environment);
	return program;

	/** @returns false when it was interrupted first. */
	async function drain(directory: string): Promise<boolean> {
		let datapath: Datapath;
		try {
			datapath = openDatapath(directory);
		} catch (error) {
			if (error instanceof NotLoadedError) {
				return true;
			}

			throw error;
		}

		try {
			setAcceleration(datapath, 'off');
			for (let told = 0; ;) {
				const left = datapath.rawMaps.get('accelerated')!.count();
				if (left === 0 || signal.aborted) {
					return left === 0;
				}

				if (left !== told) {
					stderr(`${left} accelerated sockets are still open\n`);
					told = left;
				}

				await sleep(200, undefined, {signal}).catch(() => {});
			}
		} finally {
			datapath.close();
		}
	}
}

/** Accelerated connections are reset, and what was changed inside pods' namespaces is undone; of what cannot be opened, nothing is known. */
function restoreLoaded({bpffs, proc}: {readonly bpffs: string; readonly proc: string}): readonly Error[] {
	let datapath: Datapath;
	try {
		datapath = openDatapath(bpffs);
	} catch (error) {
		return error instanceof NotLoadedError ? [] : [error as Error];
	}

	try {
		return leaveNamespaces(datapath, proc);
	} finally {
		datapath.close();
	}
}

interface RunOptions extends NodeCliOptions {
	readonly podsFile?: string;
	readonly bpffs: string;
	readonly cgroup?: string;
	readonly proc: string;
	readonly metricsAddress: string;
	readonly resync?: number;
	readonly maxPods: number;
	readonly nodeNetns?: string;
	readonly resetOlder: boolean;
	readonly acceleration?: AccelerationWish;
}

/** A file that was asked for on the command line wins over a node from the environment. */
function podsOf(options: RunOptions): AgentOptions['pods'] {
	if (options.podsFile !== undefined) {
		return {file: options.podsFile};
	}

	if (!options.node) {
		throw new InputError('run', 'where are the pods to come from? Give --pods-file, or --node with the name of this node in its cluster');
	}

	return kubernetesOptions(options.node, options);
}

interface Endpoint {
	readonly address: string;
	readonly port: number;
}

/** 10.0.0.1:80, [fd00::1]:80 */
function endpoint(text: string): Endpoint {
	const match = /^(?:\[([^\]]+)]|([^:]+)):(\d{1,5})$/.exec(text);
	const port = Number(match?.[3]);
	try {
		const address = canonicalAddress(match?.[1] ?? match?.[2] ?? '');
		if (!match || port < 1 || port > 65_535 || (match[2] !== undefined && !isIpv4Address(match[2]))) {
			throw new TypeError('not an endpoint');
		}

		return {address, port};
	} catch {
		throw new InvalidArgumentError('Expected an address and a port, as 10.0.0.1:80 or [fd00::1]:80.');
	}
}
